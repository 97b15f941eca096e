from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zotune.optimizer import Method, Optimizer
from zotune.runtimes.replicas import shares, units
from zotune.testing import tiny

SPLITS = st.sampled_from(["auto", "direction", "sign", "rows"])


def question(directions: int, rows: int, estimator: str = "two-point") -> tuple:
    method = Method(directions=directions, estimator=estimator)  # type: ignore[arg-type]
    return Optimizer(method, 1).ask(0).probes, tiny.rows("mixed", rows)


@given(
    directions=st.integers(1, 9),
    rows=st.integers(1, 12),
    estimator=st.sampled_from(["two-point", "one-sided"]),
    split=SPLITS,
    unit_tokens=st.integers(1, 2000),
)
def test_units_cover_every_probe_and_row_once_and_join_to_the_whole(
    directions: int, rows: int, estimator: str, split: str, unit_tokens: int
) -> None:
    probes, batch = question(directions, rows, estimator)
    planned = units.plan(probes, batch, split=split, unit_tokens=unit_tokens)
    ends = np.cumsum([0, *(len(row.candidates) for row in batch)])
    whole = np.arange(len(probes) * ends[-1], dtype=np.float32).reshape(len(probes), -1)
    parts = [whole[unit.probes, ends[unit.rows.start] : ends[unit.rows.stop]] for unit in planned]
    assert sum(part.size for part in parts) == whole.size
    joined = units.join(planned, parts, len(probes), batch)
    assert joined.dtype == np.float32
    np.testing.assert_array_equal(joined, whole)
    tokens = len(probes) * sum(row.n_tokens for row in batch)
    assert sum(unit.tokens for unit in planned) == tokens
    for unit in planned:
        assert unit.tokens <= unit_tokens or unit.rows.stop - unit.rows.start == 1


@given(directions=st.integers(1, 9), rows=st.integers(1, 12), unit_tokens=st.integers(1, 2000))
def test_plus_and_minus_stay_together_unless_the_split_is_by_sign(directions: int, rows: int, unit_tokens: int) -> None:
    probes, batch = question(directions, rows)
    for unit in units.plan(probes, batch, split="auto", unit_tokens=unit_tokens):
        keys = [probe.key for probe in probes[unit.probes]]
        assert len(keys) == 2 * len(set(keys))
    assert all(
        unit.probes.stop - unit.probes.start == 1
        for unit in units.plan(probes, batch, split="sign", unit_tokens=unit_tokens)
    )
    whole = slice(0, len(probes))
    assert all(unit.probes == whole for unit in units.plan(probes, batch, split="rows", unit_tokens=unit_tokens))


def test_small_directions_go_together_and_large_ones_are_cut_by_rows() -> None:
    probes, batch = question(4, 8)
    tokens = sum(row.n_tokens for row in batch)
    assert len(units.plan(probes, batch, split="auto", unit_tokens=8 * tokens)) == 1
    assert len(units.plan(probes, batch, split="direction", unit_tokens=8 * tokens)) == 4
    assert len(units.plan(probes, batch, split="auto", unit_tokens=4 * tokens)) == 2
    assert len(units.plan(probes, batch, split="auto", unit_tokens=tokens)) > 4


@given(
    costs=st.lists(st.integers(1, 1000), min_size=1, max_size=30),
    speeds=st.lists(st.floats(0.1, 1000), min_size=1, max_size=6),
)
def test_every_unit_is_dealt_once_and_nobody_is_later_than_a_greedy_deal_may_be(
    costs: list[int], speeds: list[float]
) -> None:
    """The last unit of a share would have been done no sooner by anyone else, summed over all who might have had it."""
    dealt = shares.deal(costs, speeds)
    assert sorted(unit for share in dealt for unit in share) == list(range(len(costs)))
    for share, speed in zip(dealt, speeds, strict=True):
        given = [costs[unit] for unit in share]
        last = min(given, default=0)
        assert share == sorted(share)
        assert sum(given) / speed <= (sum(costs) + (len(speeds) - 1) * last) / sum(speeds) * (1 + 1e-9)


def test_equal_replicas_have_equal_shares_although_speeds_are_noisy() -> None:
    assert [len(share) for share in shares.deal([100] * 8, [1.0, 1.2])] == [4, 4]
    assert [len(share) for share in shares.deal([100] * 8, [3.0, 1.0])] == [6, 2]
    assert [len(share) for share in shares.deal([100] * 8, [1.0, 0.01])] == [8, 0]


def test_a_replica_without_work_is_tried_again() -> None:
    speed, tried = 0.01, 0
    while not shares.deal([100] * 8, [1.0, speed])[1]:
        speed = shares.idle(speed, 1.0)
        tried += 1
    assert 1 <= tried < 20


def test_a_speed_nears_what_was_measured_or_what_others_have() -> None:
    assert shares.measured(None, 300, 2.0) == 150
    assert shares.measured(100.0, 300, 2.0) == pytest.approx(0.7 * 100 + 0.3 * 150)
    assert shares.idle(1.0, 3.0) == pytest.approx(0.95 * 1 + 0.05 * 3)
    # A clock may not have moved.
    assert 0 < shares.measured(None, 300, 0.0) < float("inf")
