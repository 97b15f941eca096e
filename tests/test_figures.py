from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zotune.figures import Smoothed, as_json, counted, duration, elapsed, from_json, percent, size


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (250, "4:10"), (7325, "2:02:05")])
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_percent() -> None:
    assert percent(0.78349) == "78.3 %"


def test_one_has_no_plural() -> None:
    assert [counted(number, "row") for number in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]


def test_elapsed_is_short_where_little_time_has_passed() -> None:
    assert [elapsed(seconds) for seconds in (0.25, 2.25, 61)] == ["250 ms", "2.2 s", "1:01"]


def test_size_has_three_digits_and_a_unit() -> None:
    assert list(map(size, (12, 999, 44_100, 999_600, 123_456_789, 1.5e9))) == [
        *("12 bytes", "999 bytes", "44.1 kB", "1 MB", "123 MB", "1.5 GB"),
    ]


def test_json_gets_no_number_that_it_does_not_have() -> None:
    record = {"loss": math.nan, "best": -math.inf, "step": 3, "done": True, "lr": 0.5, "name": "a"}
    assert as_json(record) == {"loss": None, "best": None, "step": 3, "done": True, "lr": 0.5, "name": "a"}
    assert as_json({"branches": [{"last": record}]})["branches"][0]["last"]["loss"] is None


@pytest.mark.parametrize("text", ["", "{", b"\xff", pytest.param("[" * 9999, id="deep")])
def test_what_is_no_json_is_one_kind_of_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        from_json(text)


def test_the_first_value_is_not_pulled_towards_zero() -> None:
    assert Smoothed(0.95).add(0.7) == pytest.approx(0.7)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), st.floats(0.1, 0.99))
def test_smoothed_is_the_exponentially_weighted_average(values: list[float], decay: float) -> None:
    smoothed = Smoothed(decay)
    for value in values:
        smoothed.add(value)
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert smoothed.value == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_smoothed_leaves_out_what_is_not_finite() -> None:
    smoothed = Smoothed(0.5)
    assert smoothed.add(math.nan) is None
    smoothed.add(2.0)
    assert [smoothed.add(value) for value in (None, math.inf, 5.0)] == pytest.approx([2.0, 2.0, 4.0])
