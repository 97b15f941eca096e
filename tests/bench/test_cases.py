from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from zotune.bench import cases
from zotune.bench.results import Results
from zotune.errors import ModelError

CASES = [{"model": "a", "batch": 1}, {"model": "a", "batch": 2}, {"model": "b", "batch": 1}]


class Bench:
    """Counts what it measures; fails on the cases that it is told to, or is interrupted there."""

    def __init__(self, folder: Path, failing: Mapping[str, BaseException] | None = None) -> None:
        self.results, self.failing, self.measured = Results(folder, "scaling"), failing or {}, []
        self.text = StringIO()

    def run(self, **options: Any) -> list[Any]:
        return cases.run(self.results, CASES, self._measure, console=Console(file=self.text, width=200), **options)

    def _measure(self, case: Any) -> dict[str, Any]:
        self.measured.append(case)
        if case["model"] in self.failing:
            raise self.failing[case["model"]]
        return {"step_s": 0.5}


def test_what_was_interrupted_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Bench(tmp_path, {"b": KeyboardInterrupt()}).run()
    second = Bench(tmp_path)
    assert [dict(result.case) for result in second.run()] == CASES
    assert second.measured == CASES[2:]
    assert "2 of 3 cases measured already" in second.text.getvalue()


@pytest.mark.parametrize("error", [ModelError("no such site"), RuntimeError("out of memory")])
def test_a_case_that_fails_is_a_result_and_is_measured_again_only_when_asked(tmp_path: Path, error: Exception) -> None:
    bench = Bench(tmp_path, {"a": error})
    found = bench.run()
    assert [result.figures for result in found] == [{"error": str(error)}] * 2 + [{"step_s": 0.5}]
    again = Bench(tmp_path)
    again.run()
    assert again.measured == []
    assert [result.figures for result in again.run(retry=True)] == [{"step_s": 0.5}] * 3
    assert again.measured == CASES[:2]


def test_a_mistake_in_the_benchmark_itself_is_not_a_result(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        Bench(tmp_path, {"a": KeyError("batch")}).run()
    assert not list(tmp_path.iterdir())


def test_no_case_begins_after_the_time_is_up(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.run(minutes=0) == []
    assert bench.measured == []
    assert "3 cases left" in bench.text.getvalue()


def test_the_time_left_follows_from_the_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(t) for t in (0, 0, 10, 10, 40, 40, 50))
    monkeypatch.setattr(cases.time, "monotonic", lambda: next(clock))
    bench = Bench(tmp_path)
    bench.run(cost=lambda case: {1: 1.0, 2: 3.0}[case["batch"]])
    lines = bench.text.getvalue().splitlines()
    assert [line.rsplit("  ", 1)[1].strip() for line in lines] == ["0:40 left", "0:10 left", "0:00 left"]
