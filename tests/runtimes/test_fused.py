"""The fold of a GPU against the one chunk by chunk: the same noise, so the same bits."""

import pytest
import torch
from torch import Tensor

from zotune.layout import Site
from zotune.noise import NoiseBlock, bits16_at, hashes, streams
from zotune.runtimes import folding, fused
from zotune.runtimes.folding import StochasticFold
from zotune.runtimes.move import Move

KEY = "fold/3/12"


def folded(start: dict[str, Tensor], change: dict[str, Tensor], keep: dict[str, float]) -> dict[str, Tensor]:
    weights = {name: weight.clone() for name, weight in start.items()}
    moves = (Move(Site(name, tuple(w.shape)), w, change[name].__getitem__, keep[name]) for name, w in weights.items())
    StochasticFold(3).add_all(moves, 12)
    return weights


@pytest.mark.parametrize(
    ("shape", "dtype", "compiled"),
    [
        *(((70, 33), dtype, False) for dtype in (torch.bfloat16, torch.float16)),
        ((1, 5), torch.bfloat16, False),
        ((64,), torch.bfloat16, False),
        # A vector of two streams of noise.
        (((1 << 19) + 5,), torch.bfloat16, False),
        ((4096, 300), torch.bfloat16, True),
    ],
    ids=str,
)
def test_it_folds_to_the_same_bits(
    shape: tuple[int, ...], dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"first": (9,), "w": shape, "matrix": (3, 5), "decayed": (11,), "last": (30,)}
    start = {name: torch.randn(each, generator=generator).to(dtype) for name, each in shapes.items()}
    change = {name: torch.randn(each, generator=generator) / 20 for name, each in shapes.items()}
    keep = dict.fromkeys(shapes, 1.0) | {"w": 0.999, "decayed": 0.999}
    expected = folded(start, change, keep)
    if not compiled:
        monkeypatch.setattr(fused, "_kernel", lambda: fused.fold_rows)
    # Several kernels for the largest, whose rows are in three chunks.
    monkeypatch.setattr(fused, "_LARGEST", 600_000)
    monkeypatch.setattr(folding, "_on_gpu", lambda _: True)
    found = folded(start, change, keep)
    for name in shapes:
        assert torch.equal(found[name], expected[name])
        assert not torch.equal(found[name], start[name])


def test_the_next_fold_has_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_kernel", lambda: fused.fold_rows)
    start, shapes = torch.ones(40), {"a": (8, 5), "b": (40,)}
    outcomes = []
    for on_gpu in (True, False):
        monkeypatch.setattr(folding, "_on_gpu", lambda _, on_gpu=on_gpu: on_gpu)
        fold = StochasticFold(3)
        weights = {name: start.view(shape).bfloat16() for name, shape in shapes.items()}
        for step in (5, 10):
            changes = {name: torch.full(shape, 2.0**-9) for name, shape in shapes.items()}
            fold.add_all([Move(Site(n, shapes[n]), w, changes[n].__getitem__) for n, w in weights.items()], step)
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
