import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zotune.schedules import SCHEDULES, factor

NAMES = sorted(SCHEDULES)


@given(schedule=st.sampled_from(NAMES), steps=st.integers(1, 10_000), warmup=st.integers(0, 12_000), data=st.data())
def test_the_factor_is_a_share_and_moves_by_small_steps(
    schedule: str, steps: int, warmup: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, steps - 1))
    here, there = factor(schedule, step, steps, warmup), factor(schedule, step + 1, steps, warmup)
    assert 0 <= here <= 1
    assert 0 <= there <= 1
    # The cosine is the steepest of them, by half pi; a warm-up climbs by its own slope.
    slope = math.pi / 2 / max(1, steps - warmup) if step >= warmup else 1 / warmup
    assert abs(there - here) <= slope + 1e-12


@given(schedule=st.sampled_from(NAMES), steps=st.integers(2, 10_000), data=st.data())
def test_the_warm_up_rises_from_zero_and_ends_where_the_schedule_begins(
    schedule: str, steps: int, data: st.DataObject
) -> None:
    warmup = data.draw(st.integers(1, steps - 1))
    assert factor(schedule, 0, steps, warmup) == 0
    assert factor(schedule, warmup - 1, steps, warmup) == pytest.approx(1 - 1 / warmup)
    assert factor(schedule, warmup, steps, warmup) == 1


@given(schedule=st.sampled_from(NAMES), steps=st.integers(1, 10_000), warmup=st.integers(0, 9_999))
def test_a_run_of_known_length_ends_at_zero_unless_constant(schedule: str, steps: int, warmup: int) -> None:
    warmup = min(warmup, steps - 1)
    assert factor(schedule, steps, steps, warmup) == pytest.approx(1 if schedule == "constant" else 0, abs=1e-12)


def test_factors_by_hand() -> None:
    assert [factor("linear", step, 12, 4) for step in (0, 1, 4, 6, 8, 11)] == [0, 0.25, 1, 0.75, 0.5, 0.125]
    assert [factor("constant", step, 12, 4) for step in (2, 4, 11)] == [0.5, 1, 1]
    cosine = [factor("cosine", step, 12, 4) for step in (4, 6, 8, 10)]
    assert cosine == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])
