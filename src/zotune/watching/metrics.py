"""What ``metrics.jsonl`` of a run says, read back."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from zotune.errors import JournalError
from zotune.figures import Smoothed
from zotune.reporters import SCORES


class _Step(TypedDict):
    kind: Literal["step"]
    step: int
    loss: float | None
    lr: float
    coefficients: list[float]
    seconds: float | None
    rows_per_s: float | None
    skipped: bool


class _Evaluation(TypedDict):
    kind: Literal["eval"]
    step: int
    loss: float | None
    seconds: float
    accuracy: NotRequired[float | None]
    exact_match: NotRequired[float | None]
    f1: NotRequired[float | None]
    examples: NotRequired[int]
    rows: NotRequired[str]


_RECORD: TypeAdapter[_Step | _Evaluation] = TypeAdapter(Annotated[_Step | _Evaluation, Field(discriminator="kind")])


def parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line of ``metrics.jsonl``, or None if it is damaged."""
    try:
        return dict(_RECORD.validate_json(line, strict=True))
    except ValidationError:
        return None


def comparable(evaluations: Sequence[dict[str, Any]], rows: str | None = None) -> list[dict[str, Any]]:
    """The records of what was evaluated on the same validation rows, in their order.

    A record that names no rows, as earlier versions wrote it, is of those that the first one names.

    Args:
        evaluations: In the order in which they were recorded; each may have the checksum of its validation rows as
            ``rows``.
        rows: The checksum of the rows; default: those of the last evaluation.
    """
    first = next((record["rows"] for record in evaluations if record.get("rows")), rows)
    named = [record.get("rows", first) for record in evaluations]
    rows = rows or (named[-1] if named else None)
    return [record for record, its in zip(evaluations, named, strict=True) if its == rows]


@dataclass(frozen=True)
class RunMetrics:
    """The lines of ``metrics.jsonl``, ascending by step; of two lines for one step the later counts.

    Attributes:
        steps: One record per finished step.
        evaluations: One record per evaluation on the validation rows of the last one; its ``step`` is the number of
            steps that were finished.
    """

    steps: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]

    @property
    def score_name(self) -> str | None:
        """The share that the run is judged by; None where only its loss can be compared."""
        present = (name for name in SCORES if any(record.get(name) is not None for record in self.evaluations))
        return next(present, None)

    @property
    def seconds(self) -> float:
        """Seconds of training, evaluations left out; a killed process may have lost those of its last step."""
        return sum(record["seconds"] or 0.0 for record in self.steps)

    def clock(self) -> Callable[[int], float]:
        """Seconds of training after a number of finished steps."""
        totals = [0.0, *accumulate(record["seconds"] or 0.0 for record in self.steps)]
        # A killed process may have lost lines, so that a step and its place in the file are not the same.
        known = [record["step"] for record in self.steps]
        return lambda step: totals[bisect_right(known, step)]


def read(run: Path) -> RunMetrics:
    """Read ``metrics.jsonl`` of a run directory. A last line without its end, as a killed process leaves, is ignored.

    Raises:
        JournalError: The file is missing or holds no step and no evaluation, or another line is damaged.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise JournalError(f"cannot read the metrics {path}: {error.strerror}; is {run} a run directory?") from error
    kinds: dict[str, list[dict[str, Any]]] = {"step": [], "eval": []}
    for number, line in enumerate(lines[:-1], start=1):
        if (record := parse(line)) is None:
            raise JournalError(f"line {number} of {path} is damaged: {line[:60]!r}; remove it to go on")
        kinds[record["kind"]].append(record)
    if not kinds["step"] and not kinds["eval"]:
        raise JournalError(f"{path} holds no step and no evaluation yet, so there is nothing to show")
    return RunMetrics(_ascending(kinds["step"]), _ascending(comparable(kinds["eval"])))


def _ascending(records: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    by_step = {record["step"]: record for record in records}
    return tuple(by_step[step] for step in sorted(by_step))


def number(value: float | None) -> float:
    """NaN, which leaves a gap in a curve, for what is missing or not finite."""
    return value if value is not None and math.isfinite(value) else math.nan


def smoothed(values: Iterable[float | None]) -> list[float]:
    """The moving average after each value (`zotune.figures.Smoothed`); NaN before the first that counts."""
    average = Smoothed()
    return [number(average.add(value)) for value in values]
