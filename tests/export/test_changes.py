from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zotune.export.changes import Change, Spectrum
from zotune.export.truncation import Truncation
from zotune.layout import Site

SITE = Site("layer.weight", (9, 6))


def parts(seed: int, count: int, rank: int) -> list[tuple[Tensor, Tensor, float]]:
    """Factors and what weight decay leaves, for windows of a site."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(9, rank, generator=draw), torch.randn(6, rank, generator=draw), 1.0 if seed % 2 else 0.9)
        for _ in range(count)
    ]


@given(seed=st.integers(0, 2**31), count=st.integers(1, 8), rank=st.integers(1, 3), limit=st.integers(1, 7))
@settings(max_examples=50)
def test_factors_are_the_nearest_matrix_and_their_error_is_known(seed: int, count: int, rank: int, limit: int) -> None:
    weight = torch.randn(9, 6, generator=torch.Generator().manual_seed(seed + 1))
    change, moved = Change(SITE.shape), weight.clone().double()
    for left, right, keep in parts(seed, count, rank):
        moved = keep * moved + left.double() @ right.double().T
        change.add_product(left, right, keep)
    expected = moved - weight.double()
    spectrum = change.decompose(weight)
    left, right = spectrum.factors(limit)
    assert (left.shape, right.shape) == ((9, limit), (6, limit))
    values = torch.linalg.svdvals(expected)
    assert spectrum.norm == pytest.approx(float(expected.norm()), rel=1e-5)
    assert float((left @ right.T - expected).norm()) == pytest.approx(
        float(values[limit:].norm()), abs=1e-5 * spectrum.norm
    )
    assert spectrum.error(limit) == pytest.approx(float(values[limit:].norm()), abs=1e-5 * spectrum.norm)


def test_the_rank_is_that_of_the_numbers_and_not_of_the_columns() -> None:
    left, right = torch.randn(50, 2), torch.randn(40, 2)
    change = Change((50, 40))
    for scale in (1.0, -0.5, 2.0):
        change.add_product(scale * left, right)
    spectrum = change.decompose(torch.zeros(50, 40))
    assert spectrum.rank == 2
    made, expected = (spectrum.left * spectrum.values) @ spectrum.right.T, 2.5 * left.double() @ right.double().T
    torch.testing.assert_close(made, expected, atol=1e-12, rtol=0)


def test_what_did_not_move_has_rank_zero() -> None:
    change = Change(SITE.shape)
    change.add_product(torch.zeros(9, 2), torch.randn(6, 2))
    spectrum = change.decompose(torch.randn(9, 6))
    truncation = Truncation(4, 0.0)
    assert not torch.cat([side.flatten() for side in truncation.cut(SITE, spectrum).factors(4)]).any()
    assert (truncation.rank, truncation.error, truncation.worst) == (1, 0.0, None)


def test_what_nothing_was_added_to_has_rank_zero() -> None:
    spectrum = Change(SITE.shape).decompose(torch.randn(9, 6))
    assert (spectrum.rank, spectrum.norm) == (0, 0.0)
    assert not torch.cat(spectrum.factors(2)).any()


def test_the_sufficient_rank_suffices_and_one_less_does_not() -> None:
    spectrum = Spectrum.of(torch.randn(30, 20, dtype=torch.float64))
    rank = spectrum.sufficient(0.3)
    assert spectrum.error(rank) <= 0.3 * spectrum.norm < spectrum.error(rank - 1)


@pytest.mark.parametrize("order", [("near", "far"), ("far", "near")])
def test_truncation_keeps_account_of_all_sites(order: tuple[str, str]) -> None:
    # The one that is nearer, for its size, loses more.
    near, far = (torch.diag(torch.tensor(values, dtype=torch.float64)) for values in ([300.0, 3.0], [3.0, 0.3]))
    truncation = Truncation(1, 0.2)
    for name in order:
        truncation.cut(Site(name, (2, 2)), Spectrum.of({"near": near, "far": far}[name]))
    assert truncation.worst is not None
    assert truncation.worst[0] == "far"
    assert truncation.worst[1] == pytest.approx(0.3 / float(far.norm()))
    assert truncation.error == pytest.approx(
        float(torch.cat([near, far])[[1, 3]].norm() / torch.cat([near, far]).norm())
    )
