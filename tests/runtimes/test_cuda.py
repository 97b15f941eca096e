"""What only a GPU runs: FlashAttention over spans, graphs, the kernel of a fold; and all else once more, over there."""

from typing import Any

import numpy as np
import pytest
import torch

from zotune.layout import Site
from zotune.optimizer import Method, Optimizer
from zotune.protocol import Probe
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.folding.fold import StochasticFold
from zotune.runtimes.folding.move import LowRankChange, Move
from zotune.testing import conformance, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

METHOD = Method(eps=1e-2, lr=1e-3, interval=3, directions=2)
FAMILIES = ["opt", "llama", "gpt2", "gemma3", "qwen3"]
METHODS = ["all", "linear", "last-layers", "momentum", "dense"]


def there(model: Any, method: Method, **options: Any) -> EmbeddedRuntime:
    return EmbeddedRuntime(model.cuda(), method, **options)


def runtime(family: str, method: Method = METHOD, *, spans: bool = True) -> EmbeddedRuntime:
    made = there(tiny.model(family, torch.bfloat16, head_size=16), method)
    assert made._spans
    if not spans:
        made._spans, made._graphs = False, None
    return made


def probes(step: int, method: Method = METHOD) -> tuple[Probe, ...]:
    return Optimizer(method, 100).ask(step).probes


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_the_suite_passes_on_a_gpu(check: Any, family: str, method: str) -> None:
    check(conformance.Case(there, family, conformance.METHODS[method]))


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("family", FAMILIES)
def test_spans_and_groups_agree(family: str, kind: str) -> None:
    ours, plain = runtime(family), runtime(family, spans=False)
    for seed in range(4):
        rows = tiny.rows(kind, 5, seed=seed, longest=9)
        for normalised in (True, False):
            scores, expected = (each.score(probes(0), rows, normalised=normalised) for each in (ours, plain))
            assert np.abs(scores - expected).max() < 0.1
            assert np.corrcoef(scores.ravel(), expected.ravel())[0, 1] > 0.995


@pytest.mark.parametrize("scope", ["all", "linear", "last-layers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_gives_what_its_operations_give(family: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method(scope=scope, eps=1e-2, lr=1e-3, interval=3, directions=2)  # type: ignore[arg-type]
    ours, plain = runtime(family, method), runtime(family, method)
    monkeypatch.setattr(plain._graphs, "_able", False)
    monkeypatch.setattr(plain, "_ahead", None)
    packed = []
    monkeypatch.setattr(ours._ahead, "_pack", lambda *args: packed.append(args) or ours._packed(*args))
    batches = [tiny.rows("single", 5, seed=seed, longest=9) for seed in range(2)]
    for step in range(10):
        asked = probes(step, method)
        # Right, but for every third.
        ours.expect(probes(step + 1, method), batches[(step + 1 + (step % 3 == 2)) % 2], normalised=False)
        scores, expected = (each.score(asked, batches[step % 2], normalised=False) for each in (ours, plain))
        assert np.array_equal(scores, expected)
        for each in (ours, plain):
            each.apply(Optimizer(method, 100).update(step, (2.0, -1.0)))
    assert ours._graphs is not None
    assert ours._graphs._captured
    assert len(packed) == 10 + 1 + 3, "one for each step, for the first, and for what was not expected"
    assert all(torch.equal(a, b) for a, b in zip(ours.state().values(), plain.state().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 5000), (7,), (40, 8)], ids=str)
def test_a_fold_has_the_bits_of_a_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, change = torch.randn(shape, generator=generator).to(dtype), torch.randn(shape, generator=generator) / 50
    moved, site = weight.cuda(), Site("w", shape)
    StochasticFold(3).add(Move(site, weight, change.__getitem__), 12)
    StochasticFold(3).add(Move(site, moved, change.cuda().__getitem__), 12)
    assert torch.equal(moved.cpu(), weight)


@pytest.mark.parametrize("width", [5000, 9, 1])
@pytest.mark.parametrize("rank", [1, 2, 16])
def test_low_rank_changes_are_folded_with_the_bits_of_a_cpu(width: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    here, there, weights = [], [], []
    for rows in (300, 1, 40):
        # Few bits, so that no order of the products' sum rounds.
        left, right = (torch.randint(-8, 8, (n, rank), generator=generator) / 256 for n in (rows, width))
        weight = torch.randn(rows, width, generator=generator).bfloat16()
        on_gpu = LowRankChange(left.cuda(), right.cuda())
        # The second as GPT-2 stores it.
        for name, moved in ((f"a{rows}", weight.cuda()), (f"b{rows}", weight.T.contiguous().cuda().T)):
            site, expected = Site(name, (rows, width)), weight.clone()
            here.append(Move(site, expected, LowRankChange(left, right)))
            there.append(Move(site, moved, on_gpu))
            weights.append((moved, expected))
    for moves in (here, there):
        StochasticFold(3).add_all(moves, 12)
    assert all(torch.equal(moved.cpu(), expected) for moved, expected in weights)


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_scores_as_a_cpu_does(family: str, kind: Any) -> None:
    here = EmbeddedRuntime(tiny.model(family, torch.bfloat16, head_size=16), METHOD)
    ours, rows = runtime(family), tiny.rows(kind, 12, longest=20)
    for normalised in (True, False):
        scores, expected = (each.score(probes(0), rows, normalised=normalised) for each in (ours, here))
        assert np.abs(scores - expected).max() < 0.3
        assert np.corrcoef(scores.ravel(), expected.ravel())[0, 1] > 0.99
