"""A learning curve: what was reached, after how many steps, forwards and seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from zotune.data import BatchOrder
from zotune.evaluate import Metrics
from zotune.figures import finite
from zotune.rows import Example


@dataclass(frozen=True)
class Spent:
    """What forward passes computed.

    Attributes:
        rows: Sequences, each counted as often as it was scored.
        tokens: Of these, padding included where there is any.
    """

    rows: int = 0
    tokens: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.rows + other.rows, self.tokens + other.tokens)


@dataclass(frozen=True)
class Evaluated:
    """An evaluation on the validation rows.

    Attributes:
        step: Finished steps.
        metrics: What it found.
        seconds: Of training so far; loading and evaluating do not count.
    """

    step: int
    metrics: Metrics
    seconds: float


@dataclass(frozen=True)
class Point:
    """One point of a learning curve.

    Attributes:
        step: Finished steps.
        rows: See `Spent`; evaluations do not count.
        tokens: See `Spent`.
        seconds: Of training so far.
        loss: On the validation rows; None where it is not finite.
        accuracy: On the validation rows.
    """

    step: int
    rows: int
    tokens: int
    seconds: float
    loss: float | None
    accuracy: float | None


Curve = tuple[Point, ...]
"""Ascending by step."""


def along(found: Iterable[Evaluated], spent: Sequence[Spent]) -> Curve:
    """The curve of some evaluations, given what had been spent after each number of steps."""
    return tuple(
        Point(
            each.step,
            spent[each.step].rows,
            spent[each.step].tokens,
            round(each.seconds, 3),
            finite(each.metrics.loss),
            each.metrics.accuracy,
        )
        for each in found
    )


def spending(
    step: Callable[[Sequence[Example]], Spent],
    train: Sequence[Example],
    order: BatchOrder,
    steps: int,
) -> list[Spent]:
    """What has been spent after 0, 1, ... ``steps`` steps.

    Args:
        step: What a step on a batch computes.
        train: The training rows.
        order: Of the batches.
        steps: Of the training.
    """
    each = (step([train[index] for index in order.indices(number)]) for number in range(steps))
    return list(accumulate(each, initial=Spent()))


def reached(curve: Curve, accuracy: float) -> Point | None:
    """The first point of at least this accuracy; None if there is none."""
    return next((point for point in curve if point.accuracy is not None and point.accuracy >= accuracy), None)


def figures(curve: Curve) -> dict[str, Any]:
    """What a result keeps of a curve."""
    last = curve[-1]
    shown = {"loss": last.loss, "accuracy": last.accuracy, "seconds": last.seconds}
    return {**shown, "curve": [asdict(point) for point in curve]}


def restored(figures: Any) -> Curve:
    """The curve of a result's figures."""
    return tuple(Point(**point) for point in figures["curve"])
