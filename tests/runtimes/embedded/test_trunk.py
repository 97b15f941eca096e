"""Layers below the first that is tuned run once for all probes."""

from dataclasses import replace

import numpy as np
import pytest

from zotune.optimizer import Method, Optimizer
from zotune.protocol import CLEAN, DirectionKey, Probe
from zotune.rows import Candidate, Row
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.sites import decoder_layers
from zotune.testing import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

PROBES = [CLEAN, *(Probe(DirectionKey(0, 0, index), 1, 0.1) for index in range(3))]


def tokens_seen(runtime: EmbeddedRuntime, window: int = 0) -> list[int]:
    """Tokens that each layer's result had in a forward of all probes of a window."""
    seen: list[int] = []
    layers = decoder_layers(runtime.model)
    hooks = [
        layer.register_forward_hook(
            lambda layer, args, out: seen.append((out[0] if isinstance(out, tuple) else out).numel())
        )
        for layer in layers
    ]
    probes = [Probe(replace(p.key, window=window) if p.key else None, p.sign, p.eps) for p in PROBES]
    runtime.score(probes, tiny.rows("single", 5, seed=2))
    for hook in hooks:
        hook.remove()
    return [count // runtime.model.config.hidden_size for count in seen]


def test_forwards_are_of_few_numbers_of_probes_however_long_rows_are() -> None:
    runtime = EmbeddedRuntime(tiny.model("llama"), Method(), max_tokens=64)
    probes = [CLEAN, *(Probe(DirectionKey(0, 0, index), 1, 0.1) for index in range(16))]
    for length in range(2, 60):
        runtime.score(probes, [Row(tuple(range(4, 4 + length)), (Candidate((5,), (0,)),))], normalised=False)
    # 17 and its halves, and what these leave of 17: for each, what blocks see is kept in memory.
    assert {blocks for blocks, _ in runtime.space._stages} <= {17, 9, 8, 5, 3, 2, 1}  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
def test_only_layers_from_the_first_tuned_one_see_every_probe(family: str) -> None:
    runtime = EmbeddedRuntime(tiny.model(family), Method(scope="last-layers", interval=1))
    below, above = tokens_seen(runtime)
    assert above == len(PROBES) * below
    runtime.apply(Optimizer(runtime.method, 3).update(0, (1.0,)))
    assert tokens_seen(runtime, window=1) == [above, above], "in the second window it is the first layer's turn"
    runtime.apply(Optimizer(runtime.method, 3).update(1, (1.0,)))
    assert tokens_seen(runtime, window=2) == [below, above]
    for scope in ("linear", "all"):
        assert tokens_seen(EmbeddedRuntime(tiny.model(family), Method(scope=scope))) == [above, above]


def test_rows_that_are_cut_branch_as_well() -> None:
    rows, method = tiny.rows("mixed", 7, seed=1), Method(scope="last-layers")
    whole = EmbeddedRuntime(tiny.model("llama"), method).score(PROBES, rows)
    cut = EmbeddedRuntime(tiny.model("llama"), method, max_tokens=40).score(PROBES, rows)
    np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-5)


def test_closing_takes_the_hooks_off() -> None:
    model = tiny.model("llama")
    EmbeddedRuntime(model, Method(scope="last-layers")).close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
