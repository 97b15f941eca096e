"""What a user should know of their data before they trust a figure: repeated rows, contradictions, unequal classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from zotune.figures import counted, percent
from zotune.rows import Example, Row

RARE = 0.1
"""Share of the rows below which a class is told to be rare; with many classes, half of an equal share."""

APART = 0.1
"""Difference between a class's shares of the training and the validation rows that is told."""


def identity(example: Example) -> tuple[Row, int]:
    """What makes two examples the same to a model: the tokens, as they were cut, and the right candidate."""
    return example.row, example.gold


def repeats(name: str, examples: Sequence[Example]) -> list[str]:
    """A notice of rows that are the same as an earlier one of this split."""
    count = len(examples) - len({identity(example) for example in examples})
    return [f"{name}: {count} of {len(examples)} rows repeat another row"] if count else []


def contradictions(examples: Iterable[Example], wheres: Iterable[str]) -> list[str]:
    """A notice of rows with the same prompt and candidates as another one, of which another candidate is right."""
    first: dict[Row, tuple[int, str]] = {}
    found = []
    for example, where in zip(examples, wheres, strict=True):
        gold, earlier = first.setdefault(example.row, (example.gold, where))
        if gold != example.gold:
            found.append(f"{where} and {earlier}")
    if not found:
        return []
    return [f"{counted(len(found), 'row')} with the prompt of another row but not its label: {'; '.join(found[:3])}"]


def balance(classes: Sequence[str], train: Sequence[Example], validation: Sequence[Example]) -> list[str]:
    """Notices of rare classes, of splits that differ, and of what answering always the same would achieve.

    Args:
        classes: Names of the candidates; empty where they differ from row to row.
        train: Training examples.
        validation: Validation examples.
    """
    if not classes:
        return []
    parts = {"train": _shares(classes, train), "validation": _shares(classes, validation)}
    rare = min(RARE, 0.5 / len(classes))
    told = [
        f"{part}: only {percent(share)} of the rows are {name!r}"
        for part, shares in parts.items()
        for name, share in zip(classes, shares, strict=True)
        if share < rare
    ]
    told += [
        f"{name!r} is {percent(a)} of the training rows but {percent(b)} of the validation rows"
        for name, a, b in zip(classes, *parts.values(), strict=True)
        if abs(a - b) > max(APART, 2 * (a * (1 - a) / len(validation)) ** 0.5)
    ]
    share, name = max(zip(parts["validation"], classes, strict=True), key=lambda each: each[0])
    return [*told, f"validation: always {name!r} would be right in {percent(share)}; accuracy counts from there"]


def _shares(classes: Sequence[str], examples: Sequence[Example]) -> list[float]:
    counts = Counter(example.gold for example in examples)
    return [counts[index] / len(examples) for index in range(len(classes))]
