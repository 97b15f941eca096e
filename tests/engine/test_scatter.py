"""All modules written at once, against each module writing its own; no engine is needed."""

import pytest
import torch

from zotune.layout import Site
from zotune.noise import NoiseBlock
from zotune.runtimes.engine.scatter import Scatter
from zotune.runtimes.engine.tokens import Part, TokenMix, TunedVector
from zotune.runtimes.engine.tokenwise import Tuned, TunedMatrix, TunedTable

RANK = 2
SITES = tuple(
    Site(name, shape) for name, shape in {"q": (6, 5), "k": (4, 5), "e": (9, 5), "g": (5,), "b": (10,)}.items()
)
FACTORS = NoiseBlock(
    [site.name for site in SITES], [(site.shape[0], RANK) if site.is_matrix else site.shape for site in SITES]
)


def made(dtype: torch.dtype) -> list[Tuned]:
    """Two sites side by side in one layer, one of them a shard of every second row; a table; vectors."""
    q, k, e, g, b = SITES
    mix = TokenMix(8, 3, dtype, torch.device("cpu"))
    parts = [Part(q, slice(0, 6), slice(0, 6)), Part(k, slice(6, 8), torch.tensor([0, 2]), slice(0, 5))]
    return [
        TunedMatrix(parts, (8, 5), RANK, mix, [Part(b, slice(0, 8), slice(2, 10))]),
        TunedTable(Part(e, slice(0, 9), slice(0, 9)), 12, RANK, mix),
        TunedVector([Part(g, slice(0, 5), slice(0, 5))], 5, mix),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_column_is_what_the_modules_write(dtype: torch.dtype) -> None:
    ours, theirs = made(dtype), made(dtype)
    scatter = Scatter(ours, SITES, FACTORS)
    kept = [module.phi.data_ptr() for module in ours]
    for column in (0, 3, 1, 3):
        flat = FACTORS.draw(f"column {column}")
        scatter.show(column, flat)
        for module in theirs:
            module.show(column, dict(zip(SITES, FACTORS.views(flat), strict=True)))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.phi.dtype == other.phi.dtype
        assert torch.equal(mine.phi, other.phi)
        assert mine.phi.count_nonzero() > 0
    assert kept == [module.phi.data_ptr() for module in ours], "a captured graph reads them where they were"
