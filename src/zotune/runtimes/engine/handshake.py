"""Proof, before anything is tuned, that an engine's layers are the sites of the layout and do what they should."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zotune.errors import EngineError
from zotune.protocol import CLEAN, DirectionKey, Probe
from zotune.rows import Candidate, Row
from zotune.runtimes import wire
from zotune.runtimes.engine import shards

if TYPE_CHECKING:
    from zotune.runtimes.engine.runtime import EngineRuntime

LONGEST = 16
"""Tokens of the longest sequence that is scored here."""

_EPS = 0.05
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Largest difference of log-likelihoods that two ways of computing the same may have."""


def check(runtime: EngineRuntime, weights: Mapping[str, Tensor], model: Any) -> None:
    """Check an engine that was just started.

    Args:
        runtime: The engine's.
        weights: What the checkpoint has under the sites' names, ``(out, in)`` or ``(n,)``; of quantised sites nothing.
        model: The same checkpoint as transformers has it.

    Raises:
        EngineError: A site holds other weights than the checkpoint's, a wrapped layer is not called or not heeded, no
            probe changes a score, or the clean model is not plain vLLM's.
    """
    _check_weights(runtime, weights)
    rows = _rows(model.config.get_text_config().vocab_size)
    plus, clean = runtime.score([Probe(DirectionKey(0, 0, 0), 1, _EPS), CLEAN], rows)
    _check_calls(runtime)
    if not np.abs(plus - clean).max() > 0:
        raise EngineError("a probe does not change what vLLM scores: its layers were wrapped, but not called")
    runtime.call("plain", True)
    try:
        plain = runtime.score([CLEAN], rows)[0]
    finally:
        runtime.call("plain", False)
    if (apart := float(np.abs(plain - clean).max())) > _TOLERANCE[model.dtype]:
        raise EngineError(f"the clean model is not plain vLLM's: log-likelihoods differ by {apart:.3g}")


def _rows(vocabulary: int) -> list[Row]:
    tokens = [int(token) for token in np.linspace(3, vocabulary - 1, 24)]
    return [
        Row(tuple(tokens[:9]), (Candidate((tokens[9],), (0,)), Candidate((tokens[10],), (0,)))),
        Row(tuple(tokens[11:14]), (Candidate(tuple(tokens[14:18]), (0, 1, 2, 3)),)),
    ]


def _check_weights(runtime: EngineRuntime, weights: Mapping[str, Tensor]) -> None:
    """Every site must hold what the checkpoint has under its name."""
    for answer in runtime.call("samples"):
        for name, (plain, place, column) in answer.items():
            if name not in weights:
                continue
            sample, expected = wire.tensor(plain), shards.take(weights[name], *shards.unpack(place))
            expected = expected if column is None else expected[:, column]
            if not _same(sample, expected[: len(sample)]):
                raise EngineError(f"vLLM's place for {name} holds other weights than the checkpoint")


def _same(sample: Tensor, expected: Tensor) -> bool:
    return sample.shape == expected.shape and torch.allclose(sample.float(), expected.float(), rtol=1e-2, atol=1e-6)


def _check_calls(runtime: EngineRuntime) -> None:
    missed = {name for answer in runtime.call("missed") for name in answer}
    if missed:
        raise EngineError(
            f"vLLM does not call {len(missed)} of the layers that were wrapped, among them {sorted(missed)[0]}"
        )
