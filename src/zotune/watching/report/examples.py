"""The examples of a run whose prediction changed between its first and its last evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from zotune import models
from zotune.config import Config
from zotune.data import Dataset
from zotune.data import load as load_data
from zotune.figures import from_json
from zotune.rows import Example, checksum
from zotune.watching.metrics import comparable

Answer = int | str
"""A prediction: the index of a candidate, -1 where a score was NaN; or the text that was written."""


@dataclass(frozen=True)
class Predictions:
    """What the model answered at one evaluation.

    Attributes:
        step: Finished steps.
        predicted: One answer per validation example.
        right: Whether each of them is right.
        rows: The checksum of those examples; None where an earlier version wrote it.
    """

    step: int
    predicted: tuple[Answer, ...]
    right: tuple[bool, ...]
    rows: str | None


@dataclass(frozen=True)
class Changed:
    """An example whose prediction turned from right to wrong or back at some time.

    Attributes:
        number: Its place among the validation examples, from 1.
        prompt: Its text; None where the rows cannot be read any more.
        gold: What is right, if that is known.
        before: What the model answered at first.
        after: What it answered at last.
        right: Whether it was right, per evaluation.
    """

    number: int
    prompt: str | None
    gold: str | None
    before: str
    after: str
    right: tuple[bool, ...]


@dataclass(frozen=True)
class Changes:
    """How predictions changed over a run.

    Attributes:
        steps: Of the evaluations.
        examples: Validation examples.
        right_before: How many were right at first.
        right_after: How many were right at last.
        righted: Wrong at first and right at last.
        wronged: Right at first and wrong at last.
        flickered: The same at first and at last, and different in between.
        note: Why texts are missing, where they are.
    """

    steps: tuple[int, ...]
    examples: int
    right_before: int
    right_after: int
    righted: tuple[Changed, ...]
    wronged: tuple[Changed, ...]
    flickered: tuple[Changed, ...]
    note: str | None


def changes(run: Path, config: Config) -> Changes | None:
    """What changed between the evaluations of a run; None unless the predictions of two are on record."""
    found = read(run / "predictions.jsonl")
    if len(found) < 2:
        return None
    first, last = found[0], found[-1]
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for place, (before, after) in enumerate(zip(first.right, last.right, strict=True)):
        if any(each.right[place] != before for each in found):
            kinds.setdefault((before, after), []).append(place)
    texts, note = _texts(config, len(last.right), last.rows) if kinds else (None, None)

    def described(*outcomes: tuple[bool, bool]) -> tuple[Changed, ...]:
        places = sorted(place for outcome in outcomes for place in kinds.get(outcome, ()))
        return tuple(_changed(place, found, texts) for place in places)

    return Changes(
        steps=tuple(each.step for each in found),
        examples=len(first.right),
        right_before=sum(first.right),
        right_after=sum(last.right),
        righted=described((False, True)),
        wronged=described((True, False)),
        flickered=described((True, True), (False, False)),
        note=note,
    )


def read(path: Path) -> list[Predictions]:
    """The predictions on record, ascending by step and all of the validation rows of the last.

    A line that cannot be read is passed over, and so is a file that is not there: a report can do without.
    """
    found: dict[int, Predictions] = {}
    for record in comparable(_records(path)):
        try:
            answers = tuple(record["predicted"]), tuple(map(bool, record["right"]))
            each = Predictions(int(record["step"]), *answers, record.get("rows"))
        except (ValueError, KeyError, TypeError):
            continue
        if each.right and len(each.predicted) == len(each.right):
            found[each.step] = each
    if not found:
        return []
    size = len(found[max(found)].right)
    return [found[step] for step in sorted(found) if len(found[step].right) == size]


def _records(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            records.append(from_json(line))
    return [record for record in records if isinstance(record, dict)]


def _texts(config: Config, count: int, rows: str | None) -> tuple[Dataset | None, str | None]:
    """The run's data, read anew without its model; or why it cannot be shown."""
    try:
        described = SimpleNamespace(config=models.load_config(config.model))
        data = load_data(config.data, models.load_tokenizer(config.model), models.context_length(described))
    # The libraries below raise what they like, and all of it means that there are no texts to show.
    except Exception as error:
        return None, f"The rows cannot be read any more, so that only their numbers are shown: {error}"
    if len(data.validation) != count:
        have = len(data.validation)
        return None, f"The data has {have} validation rows now and had {count} then, so only their numbers are shown."
    if rows not in (None, checksum(data.validation)):
        return None, "The validation rows have changed since, so that only their numbers are shown."
    return data, None


def _changed(place: int, found: Sequence[Predictions], data: Dataset | None) -> Changed:
    example = None if data is None else data.validation[place]

    def told(answer: Answer) -> str:
        return _told(answer, example, data)

    return Changed(
        number=place + 1,
        prompt=None if data is None or example is None else data.decode(example.prompt).strip(),
        gold=None if example is None else " / ".join(example.answers) or told(example.gold),
        before=told(found[0].predicted[place]),
        after=told(found[-1].predicted[place]),
        right=tuple(each.right[place] for each in found),
    )


def _told(answer: Answer, example: Example | None, data: Dataset | None) -> str:
    """An answer as people read it: a candidate's text, or its number where the texts are not known."""
    if not isinstance(answer, int):
        return str(answer)
    if answer < 0:
        return "none, for a score that is not a number"
    if example is None or data is None or answer >= len(example.row.candidates):
        return f"candidate {answer}"
    return data.decode(example.row.candidates[answer].tokens).strip()
