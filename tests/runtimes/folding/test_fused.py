"""The fold of a GPU against the one chunk by chunk: the same noise, so the same bits."""

import importlib
import sys

import pytest
import torch
from torch import Tensor

from zotune.layout import Site
from zotune.noise import NoiseBlock, bits16_at, hashes, streams
from zotune.runtimes import folding
from zotune.runtimes.folding import fold, fused
from zotune.runtimes.folding.fold import StochasticFold
from zotune.runtimes.folding.move import Change, LowRankChange, Move

KEY = "fold/3/12"
KERNEL = "zotune.runtimes.folding.kernel"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel on the CPU, by Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, KERNEL, None)  # type: ignore[arg-type]
    del sys.modules[KERNEL]
    monkeypatch.setattr(folding, "kernel", importlib.import_module(KERNEL), raising=False)


def moved(weight: Tensor, elements: int) -> Tensor:
    """A copy, stored the same way, that begins so many elements after an address that is aligned."""
    order = weight if weight.is_contiguous() else weight.T
    copy = torch.cat([order.new_zeros(elements), order.flatten()])[elements:].view(order.shape)
    return copy if weight.is_contiguous() else copy.T


def folded(start: dict[str, Tensor], change: dict[str, Change], keep: dict[str, float]) -> dict[str, Tensor]:
    weights = {name: moved(weight, at) for at, (name, weight) in enumerate(start.items())}
    moves = (Move(Site(name, tuple(w.shape)), w, change[name], keep[name]) for name, w in weights.items())
    StochasticFold(3).add_all(moves, 12)
    return weights


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *(((70, 33), dtype) for dtype in (torch.bfloat16, torch.float16)),
        *(((9, 1100), dtype) for dtype in (torch.bfloat16, torch.float16)),
        ((1, 5), torch.bfloat16),
        ((64,), torch.bfloat16),
        # A vector of three streams of noise.
        (((2 << 12) + 5,), torch.bfloat16),
    ],
    ids=str,
)
def test_it_folds_to_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"first": (9,), "w": shape, "matrix": (3, 5), "decayed": (11,), "last": (30,)}
    start = {name: torch.randn(each, generator=generator).to(dtype) for name, each in shapes.items()}
    # As small as they come, where float16 has steps of one size; and this change is not stored row by row.
    start["matrix"] *= 2.0**-15
    change = {name: (torch.randn(each, generator=generator) / 20).__getitem__ for name, each in shapes.items()}
    change["matrix"] = (torch.randn(5, 3, generator=generator) * 2.0**-18).T.__getitem__
    keep = dict.fromkeys(shapes, 1.0) | {"w": 0.999, "decayed": 0.999}
    # Several streams for the larger ones, and several launches.
    monkeypatch.setattr(fold, "_CHUNK", 1 << 12)
    monkeypatch.setattr(fused, "_LARGEST", 5000)
    expected = folded(start, change, keep)
    monkeypatch.setattr(fold, "_on_gpu", lambda _: True)
    found = folded(start, change, keep)
    for name in shapes:
        assert torch.equal(found[name], expected[name])
        assert not torch.equal(found[name], start[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_low_rank_changes_are_multiplied_out_in_the_kernel(
    rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Streams of noise are for three rows, the last of the first for one.
    shapes = {"a": (22, 1032), "vector": (9,), "b": (3, 1032), "other": (21, 13), "c": (9, 1032), "kept": (8, 1032)}
    start = {name: torch.randn(each, generator=generator).to(dtype) for name, each in shapes.items()}
    # As GPT-2 stores it.
    start["other"] = start["other"].T.contiguous().T
    # Few bits, so that no order of the products' sum rounds; and parts of something larger, as a site's update is.
    factors = {
        name: [(torch.randint(-8, 8, (n, rank + 1), generator=generator) / 256)[:, :rank] for n in shape]
        for name, shape in shapes.items()
        if len(shape) == 2
    }
    whole: dict[str, Change] = {name: (left @ right.T).__getitem__ for name, (left, right) in factors.items()}
    whole["vector"] = (torch.randn(9, generator=generator) / 20).__getitem__
    low_rank = {name: LowRankChange(left, right) for name, (left, right) in factors.items()}
    keep = dict.fromkeys(shapes, 1.0) | {"kept": 0.999}
    monkeypatch.setattr(fold, "_CHUNK", 1 << 12)
    expected = folded(start, whole, keep)
    monkeypatch.setattr(fold, "_on_gpu", lambda _: True)
    found = folded(start, whole | low_rank, keep)
    for name in shapes:
        assert torch.equal(found[name], expected[name]), name


def test_the_next_fold_has_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    start, shapes = torch.ones(40), {"a": (8, 5), "b": (40,)}
    outcomes = []
    for on_gpu in (True, False):
        monkeypatch.setattr(fold, "_on_gpu", lambda _, on_gpu=on_gpu: on_gpu)
        rounded = StochasticFold(3)
        weights = {name: start.view(shape).bfloat16() for name, shape in shapes.items()}
        for step in (5, 10):
            changes = {name: torch.full(shape, 2.0**-9) for name, shape in shapes.items()}
            rounded.add_all([Move(Site(n, shapes[n]), w, changes[n].__getitem__) for n, w in weights.items()], step)
        outcomes.append(torch.cat([weight.flatten() for weight in weights.values()]))
    assert torch.equal(*outcomes)


def test_elements_are_found_wherever_they_are() -> None:
    names = ["a", "b"]
    starts, gammas = streams(hashes(names), KEY)
    at = torch.arange(91)
    for index, name in enumerate(names):
        block = NoiseBlock([name], [(7, 13)], "bits16")
        expected = block.views(block.draw(KEY))[0].flatten()
        assert torch.equal(bits16_at(starts[index], gammas[index], at), expected)
