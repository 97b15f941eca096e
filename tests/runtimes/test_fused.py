"""The fold of a GPU against the one chunk by chunk: the same noise, so the same bits."""

import pytest
import torch

from zotune.layout import Site
from zotune.noise import NoiseBlock, bits16_at, hashes, streams
from zotune.runtimes import fused
from zotune.runtimes.folding import StochasticFold, _chunks

KEY = "fold/3/12"


@pytest.mark.parametrize(
    ("shape", "dtype", "compiled"),
    [
        *(((70, 33), dtype, False) for dtype in (torch.bfloat16, torch.float16)),
        ((1, 5), torch.bfloat16, False),
        ((64,), torch.bfloat16, False),
        ((4096, 300), torch.bfloat16, True),
    ],
    ids=str,
)
def test_it_folds_to_the_same_bits(
    shape: tuple[int, ...], dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(fused, "_kernel", lambda: fused.fold_rows)
    # Several kernels for the largest, whose rows are in three chunks.
    monkeypatch.setattr(fused, "_LARGEST", 600_000)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    change = torch.randn(shape, generator=generator) / 20
    before, expected = weight.clone(), weight.clone()
    StochasticFold(3).add(Site("w", shape), expected, change.__getitem__, 0.999, 12)
    fold = fused.FusedFold()
    for name in ("another", "w"):
        folded = before.clone()
        fold.add(name, folded, change.__getitem__, 0.999, KEY, list(_chunks(folded)))
        assert torch.equal(folded, expected) == (name == "w")
    assert not torch.equal(expected, before)


def test_elements_are_found_wherever_they_are() -> None:
    names = ["a", "b"]
    starts, gammas = streams(hashes(names), KEY)
    at = torch.arange(91)
    for index, name in enumerate(names):
        block = NoiseBlock([name], [(7, 13)], "bits16")
        expected = block.views(block.draw(KEY))[0].flatten()
        assert torch.equal(bits16_at(starts[index], gammas[index], at), expected)
