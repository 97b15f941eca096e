"""The sides of a parity report: who computes the losses of a step, and the one thing that is switched there.

A cause of error is measured by two sides that differ in nothing else. What they switch is put together here from what
the runtimes offer: rows scored one at a time, transformers' own attention for a lone row, scores that ask for the whole
vocabulary, a head whose result is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch

from zotune import models
from zotune.bench import steps
from zotune.bench.runtimes import start
from zotune.config import ModelConfig
from zotune.data import Dataset
from zotune.objectives import CandidateCrossEntropy, batch_losses
from zotune.optimizer import Method
from zotune.protocol import Probe
from zotune.rows import Example
from zotune.runtimes.base import Runtime
from zotune.runtimes.embedded import EmbeddedRuntime, lora, rotary
from zotune.runtimes.engine import checkpoint_layout
from zotune.runtimes.sites import find_sites
from zotune.testing import tiny
from zotune.testing.reference import OracleRuntime

DEMO, TINY = "demo", "tiny:"
"""Names of models that need no checkpoint: the demonstration's, and before the family of a tiny random one."""

_HEAD_SIZE = 32
"""The smallest that vLLM's attention takes on a CPU."""

_TINY_ROWS = 64


@dataclass(frozen=True)
class Side:
    """Who computes losses, and how.

    Attributes:
        runtime: ``oracle``, or one of `zotune.bench.runtimes.RUNTIMES`; ``autograd`` for slopes.
        dtype: Of the model. The oracle's arithmetic is float32 whatever it is.
        rows: ``packed``: all probes and rows in one forward; ``alone``: a forward for each.
        attention: ``zotune``, or for rows alone ``eager``: transformers' own products.
        head: ``candidates``: only their rows of the head where the objective allows it; ``vocabulary``: all rows;
            ``rounded``: the candidates', with logits in the model's dtype.
    """

    runtime: str = "torch"
    dtype: str = "float32"
    rows: str = "packed"
    attention: str = "zotune"
    head: str = "candidates"

    @classmethod
    def of(cls, case: Mapping[str, Any]) -> Side:
        """The side that a case is measured on."""
        return cls(**{field.name: case[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Cause:
    """Two sides that differ in one thing.

    Attributes:
        name: The thing.
        before: Without it.
        after: With it.
    """

    name: str
    before: Side
    after: Side


def causes(dtype: str) -> list[Cause]:
    """What lies between the oracle and zotune in a dtype, one thing after the other."""
    ours = Side(dtype=dtype)
    whole = replace(ours, head="vocabulary")
    lone = replace(whole, rows="alone")
    near = replace(lone, attention="eager")
    found = [
        Cause("attention kernel", near, lone),
        Cause("packing", lone, whole),
        Cause("candidate rows of the head", whole, ours),
    ]
    if dtype == "float32":
        return [Cause("perturbing beside the weights", Side("oracle"), near), *found]
    return [
        *found,
        Cause("16-bit logits (not done)", ours, replace(ours, head="rounded")),
        Cause("dtype", replace(ours, dtype="float32"), ours),
    ]


def require_model(name: str) -> None:
    """Make sure that a model is there, before anything is measured.

    Raises:
        ModelError: It is not.
    """
    if name.startswith(TINY):
        tiny.config(name.removeprefix(TINY))
    elif name != DEMO:
        models.load_config(ModelConfig(path=name))


@contextmanager
def prepared(case: Mapping[str, Any], data: Path | None) -> Iterator[steps.Setting]:
    """A case's model as its runtime wants it, and its batches.

    Args:
        case: With ``model``, ``dtype``, ``runtime`` and ``batch_size``.
        data: As for `zotune.bench.step`; tiny models have rows of their own.
    """
    name, size = case["model"], case["batch_size"]
    load = checkpoint_layout.load if case["runtime"].startswith("vllm") else models.load
    if not name.startswith(TINY):
        path = None if name == DEMO else name
        yield steps.prepare(model=path, data=data, dtype=case["dtype"], batch_size=size, load=load)
        return
    with TemporaryDirectory() as folder:
        # 16-bit weights, so that every dtype begins with the same values.
        made = tiny.model(name.removeprefix(TINY), torch.bfloat16, head_size=_HEAD_SIZE)
        tiny.save(made, Path(folder))
        model, _ = load(ModelConfig(path=folder, dtype=case["dtype"]))
        examples = tiny.examples(_TINY_ROWS)
        data_set = Dataset(examples, (), CandidateCrossEntropy.for_examples(examples), (), str)
        yield steps.Setting(model, data_set, size)


def _oracle(model: Any, method: Method, seed: int) -> OracleRuntime:
    """The oracle; of a method that tunes LoRA matrices it has the same ones."""
    if method.lora_rank is None:
        return OracleRuntime(model, method, seed=seed)
    lora.add(model, method.lora_rank, method.lora_alpha, seed)
    return OracleRuntime(model, method, seed=seed, sites=tuple(find_sites(model, method.scope, lora=True)))


@contextmanager
def started(side: Side, setting: steps.Setting, method: Method, seed: int = 0) -> Iterator[Runtime]:
    """The runtime of a side, closed at the end."""
    if side.runtime == "oracle":
        yield _oracle(setting.model.cpu(), method, seed)
        return
    with closing(cast("Runtime", start(side.runtime, setting, method, seed=seed))) as runtime:
        if side.attention == "eager":
            model = cast("EmbeddedRuntime", runtime).model
            rotary.unwrap(model)
            model.set_attn_implementation("eager")
        if side.head == "rounded":
            _round_logits(setting.model.get_output_embeddings())
        yield runtime


def _round_logits(head: Any) -> None:
    """Round the result of a wrapped head, which is float32, to what a head in the model's dtype would give."""
    exact = head.forward
    head.forward = lambda x: exact(x).to(x.dtype).float()


def losses(
    side: Side, runtime: Runtime, setting: steps.Setting, probes: Sequence[Probe], batch: Sequence[Example]
) -> list[float]:
    """The mean loss of every probe on a batch, as the training loop takes it."""
    objective = setting.dataset.objective
    normalised = objective.normalised or side.head == "vocabulary"
    rows = [example.row for example in batch]
    if side.rows == "packed":
        scores = runtime.score(probes, rows, normalised=normalised)
    else:
        lone = [[runtime.score([probe], [row], normalised=normalised) for row in rows] for probe in probes]
        scores = np.block(lone)
    return batch_losses(objective, scores, batch)
