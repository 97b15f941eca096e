from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zotune.bench.fits import fit

sizes = st.lists(st.integers(1, 10**6), min_size=2, max_size=8, unique=True)
seconds = st.floats(1e-4, 10.0)


@given(sizes, seconds, seconds)
def test_a_line_is_found_again(xs: list[int], slope: float, intercept: float) -> None:
    line = fit(xs, [intercept + slope * x for x in xs])
    assert line is not None
    assert line.slope == pytest.approx(slope, rel=1e-4)
    assert line.at(max(xs)) == pytest.approx(intercept + slope * max(xs), rel=1e-6)
    assert line.apart < 1e-4
    assert line.points == len(xs)


def test_the_share_that_does_not_grow() -> None:
    line = fit([1.0, 2.0, 4.0], [3.0, 4.0, 6.0])
    assert line is not None
    assert line.intercept_share(8.0) == pytest.approx(0.2)


def test_short_steps_count_as_much_as_long_ones() -> None:
    # By absolute distances a tenth too much at 1000 would hide an intercept of 1 wholly.
    line = fit([1.0, 2.0, 4.0, 1000.0], [2.0, 3.0, 5.0, 1101.0])
    assert line is not None
    assert line.intercept == pytest.approx(1.0, abs=0.2)
    assert 0.0 < line.apart < 0.1


def test_one_point_has_no_line() -> None:
    assert fit([], []) is None
    assert fit([3.0, 3.0], [1.0, 2.0]) is None
