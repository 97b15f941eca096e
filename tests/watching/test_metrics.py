from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from zotune.errors import JournalError
from zotune.watching import metrics


def step(number: int, loss: float | None, seconds: float | None = 0.5) -> dict[str, Any]:
    record = {"kind": "step", "step": number, "loss": loss, "lr": 1e-6, "coefficients": [0.5]}
    return {**record, "seconds": seconds, "rows_per_s": None, "skipped": loss is None}


def evaluation(number: int, **scores: float | None) -> dict[str, Any]:
    return {"kind": "eval", "step": number, "loss": 0.7, "seconds": 7.0, **scores}


def write(run: Path, *records: dict[str, Any], tail: str = "") -> Path:
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return run


def test_a_torn_last_line_is_ignored(tmp_path: Path) -> None:
    whole = metrics.read(write(tmp_path, step(1, 0.5)))
    assert metrics.read(write(tmp_path, step(1, 0.5), tail='{"kind": "st')) == whole
    assert metrics.read(write(tmp_path, step(1, 0.5), tail='{"kind": "step", "step": 2')) == whole


def test_the_later_of_two_lines_for_a_step_counts(tmp_path: Path) -> None:
    found = metrics.read(write(tmp_path, step(1, 0.5), step(2, 0.4), step(1, 0.6)))
    assert [record["loss"] for record in found.steps] == [0.6, 0.4]


@pytest.mark.parametrize(
    "line",
    ["{torn", "[1]", pytest.param('{"a":' * 9999, id="deep"), '{"kind": "step"}', '{"kind": "other", "step": 1}', ""],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    run = write(tmp_path, step(1, 0.5), tail=f"{line}\n" + json.dumps(step(2, 0.5)) + "\n")
    with pytest.raises(JournalError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        metrics.read(run)


def test_what_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"is .* a run directory"):
        metrics.read(tmp_path)
    with pytest.raises(JournalError, match="nothing to show"):
        metrics.read(write(tmp_path))


def test_seconds_are_those_of_the_steps_as_far_as_they_are_known(tmp_path: Path) -> None:
    run = write(tmp_path, evaluation(0), step(1, 0.5), step(2, None), step(3, 0.5, seconds=None))
    assert metrics.read(run).seconds == 1.0


def test_the_clock_goes_on_where_lines_or_seconds_were_lost(tmp_path: Path) -> None:
    run = write(tmp_path, step(1, 0.5, 1.0), step(2, 0.5, seconds=None), step(4, 0.5, 2.0))
    clock = metrics.read(run).clock()
    assert [clock(done) for done in range(6)] == [0, 1, 1, 1, 3, 3]


@pytest.mark.parametrize(
    ("scores", "name"),
    [
        ({"accuracy": 0.5}, "accuracy"),
        ({"accuracy": None}, None),
        ({}, None),
        ({"accuracy": None, "exact_match": 0.1, "f1": 0.2}, "f1"),
    ],
)
def test_a_run_is_judged_by_the_first_score_that_any_evaluation_has(
    tmp_path: Path, scores: dict[str, float | None], name: str | None
) -> None:
    assert metrics.read(write(tmp_path, evaluation(0), evaluation(2, **scores))).score_name == name


def test_what_is_not_a_number_leaves_a_gap() -> None:
    assert metrics.number(0.5) == 0.5
    assert all(math.isnan(metrics.number(value)) for value in (None, math.nan, math.inf, -math.inf))


def test_only_what_was_evaluated_on_the_last_rows_is_compared(tmp_path: Path) -> None:
    recorded = [
        evaluation(0),
        evaluation(4) | {"rows": "a"},
        evaluation(4) | {"rows": "b"},
        evaluation(8) | {"rows": "b"},
    ]
    assert metrics.read(write(tmp_path, *recorded)).evaluations == (recorded[2], recorded[3])
    # Who goes back to earlier rows can compare with what was recorded then.
    recorded.append(evaluation(12) | {"rows": "a"})
    assert metrics.read(write(tmp_path, *recorded)).evaluations == (recorded[0], recorded[1], recorded[4])
    assert metrics.comparable(recorded, "b") == recorded[2:4]
    assert metrics.comparable(recorded, "c") == []
    # Earlier versions named no rows.
    assert metrics.comparable(recorded[:1], "c") == metrics.comparable(recorded[:1]) == recorded[:1]
    assert metrics.comparable([]) == []
