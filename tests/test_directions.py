import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from zotune.directions import DenseDirections, LowRankDirections
from zotune.layout import Site
from zotune.protocol import DirectionKey

LIMIT = 5.0
SITES = (Site("a.weight", (12, 7)), Site("a.bias", (12,), decays=False), Site("b.weight", (12, 7)))
KEY = DirectionKey(window=2, step=13, index=1)


def low_rank(sites: tuple[Site, ...] = SITES, **options: object) -> LowRankDirections:
    return LowRankDirections(sites, **({"seed": 3, "rank": 2} | options))  # type: ignore[arg-type]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_low_rank_direction_is_u_times_v_and_a_vector_is_z(scale: float) -> None:
    drawn = low_rank(scale=scale)
    u, z, _ = drawn.factors.views(drawn.draw(KEY))
    v, none, _ = low_rank().window(2)
    assert u.shape == (12, 2)
    assert v is not None
    assert v.shape == (7, 2)
    assert none is None
    first, vector, third = drawn.dense(KEY)
    torch.testing.assert_close(first, scale * u @ v.T)
    assert torch.equal(vector, z)
    assert first.shape == third.shape
    assert not torch.allclose(first, third)


def test_a_direction_is_zero_where_it_is_not_a_sites_turn() -> None:
    first, second, always = (
        replace(site, turn=turn) for site, turn in zip(SITES, [(0, 2), (1, 2), (0, 1)], strict=True)
    )
    for made in (low_rank((first, second, always)), DenseDirections((first, second, always), seed=3)):
        every = (low_rank() if isinstance(made, LowRankDirections) else DenseDirections(SITES, seed=3)).dense(KEY)
        found = made.dense(KEY)
        assert KEY.window == 2
        assert equal([found[0], found[2]], [every[0], every[2]])
        assert not found[1].any()
        later = made.dense(replace(KEY, window=3))
        assert not later[0].any()
        assert later[1].all()


@pytest.mark.parametrize("field", ["window", "step", "index"])
def test_every_part_of_a_key_counts(field: str) -> None:
    other = replace(KEY, **{field: 40})
    assert not equal(low_rank().dense(KEY)[:1], low_rank().dense(other)[:1])
    # The window fixes V alone, step and index U and z alone; V is the same for every step of a window.
    assert torch.equal(low_rank().draw(KEY), low_rank().draw(other)) == (field == "window")


def test_the_seed_counts() -> None:
    here, there = low_rank(), low_rank(seed=4)
    assert not torch.equal(here.draw(KEY), there.draw(KEY))
    assert not torch.equal(here.window(2)[0], there.window(2)[0])  # type: ignore[arg-type]
    dense = [DenseDirections(SITES, seed=seed).dense(KEY) for seed in (3, 3, 4)]
    assert equal(dense[0], dense[1])
    assert not any(torch.equal(x, y) for x, y in zip(dense[0], dense[2], strict=True))


@pytest.mark.parametrize("make", [low_rank, lambda sites=SITES: DenseDirections(sites, seed=3)])
def test_a_site_has_the_same_direction_whatever_else_is_tuned(make: type[LowRankDirections]) -> None:
    everything, alone, swapped = make().dense(KEY), make(SITES[2:]).dense(KEY), make(SITES[::-1]).dense(KEY)
    assert equal(alone, everything[2:])
    assert equal(swapped[::-1], everything)


def test_a_dense_direction_is_drawn_site_by_site() -> None:
    directions = DenseDirections(SITES, seed=3)
    assert equal([directions.draw(KEY, site) for site in SITES[::-1]][::-1], directions.dense(KEY))
    assert [tuple(z.shape) for z in directions.dense(KEY)] == [site.shape for site in SITES]


def test_rademacher_factors_are_signs() -> None:
    drawn = low_rank(distribution="rademacher", rank=3)
    v = drawn.window(0)[0]
    assert v is not None
    for x in (drawn.draw(KEY), v, *DenseDirections(SITES, seed=0, distribution="rademacher").dense(KEY)):
        assert set(x.unique().tolist()) == {-1.0, 1.0}
    assert set(drawn.dense(KEY)[0].unique().tolist()) <= {-3.0, -1.0, 1.0, 3.0}


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("rank", [1, 3])
def test_covariance_of_the_entries_is_rank_times_identity(rank: int, distribution: str) -> None:
    """E[(U V^T)_ij (U V^T)_kl] = r delta_ik delta_jl, over steps, windows and sites."""
    sites = tuple(Site(f"layers.{i}.weight", (3, 4)) for i in range(1000))
    directions = low_rank(sites, rank=rank, distribution=distribution)
    drawn = torch.cat([torch.stack(directions.dense(DirectionKey(step, step, 0))) for step in range(20)])
    entries = drawn.flatten(1).double()
    products = entries.unsqueeze(2) * entries.unsqueeze(1)
    mean, spread = products.mean(0), products.std(0) / math.sqrt(len(products))
    # A product of signs is certain where rank is one, up to rounding.
    z = (mean - rank * torch.eye(12)) / spread.clamp_min(1e-9)
    assert z.abs().max() < LIMIT
    assert (entries.mean(0) / entries.std(0) * math.sqrt(len(entries))).abs().max() < LIMIT


def test_a_normalised_direction_has_variance_one() -> None:
    sites = tuple(Site(f"layers.{i}.weight", (8, 8)) for i in range(50))
    directions = low_rank(sites, rank=64, scale=1 / 8)
    means = torch.stack(directions.dense(KEY)).square().mean((1, 2))
    assert abs(float(means.mean()) - 1) / (float(means.std()) / math.sqrt(50)) < LIMIT


def test_streams_steps_windows_indices_seeds_and_sites_are_independent() -> None:
    n = 160
    sites = (Site("model.layers.0.q_proj.weight", (n, n)), Site("model.layers.1.q_proj.weight", (n, n)))
    drawn: list[Tensor] = []
    for seed in (0, 1):
        factored, dense = LowRankDirections(sites, seed=seed, rank=n), DenseDirections(sites, seed=seed)
        for number in (0, 1, 2):
            # Window, step and index in turn have the same number, so that streams cannot differ by their numbers.
            keys = (DirectionKey(number, number, 0), DirectionKey(0, 0, number + 1))
            for key in keys:
                drawn += factored.factors.views(factored.draw(key))
                drawn += dense.dense(key)
            drawn += [v for v in factored.window(number) if v is not None]
    x = torch.stack([sample.flatten() for sample in drawn]).double()
    assert len(x) == 60
    for y in (x, (x.square() - 1) / math.sqrt(2)):
        z = (y @ y.T / n)[*torch.triu_indices(60, 60, offset=1)]
        assert z.abs().max() < LIMIT
        assert abs(float(z.square().sum()) - len(z)) / math.sqrt(2 * len(z)) < LIMIT


def test_cuda_draws_the_same_direction() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    here, there = low_rank(), low_rank(device="cuda")
    assert torch.equal(there.draw(KEY).cpu(), here.draw(KEY))
    for v, w in zip(here.window(2), there.window(2), strict=True):
        assert v is None or torch.equal(v, w.cpu())  # type: ignore[union-attr]
    dense = [DenseDirections(SITES, seed=3, device=device).dense(KEY) for device in ("cpu", "cuda")]
    assert equal(dense[0], [z.cpu() for z in dense[1]])
