"""Straight lines through measured times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Line:
    """``seconds = intercept + slope * x``.

    Attributes:
        slope: Seconds per unit of x.
        intercept: Seconds.
        apart: Largest distance of a point from the line, as a share of the point.
        points: How many it was fitted to.
    """

    slope: float
    intercept: float
    apart: float
    points: int

    def at(self, x: Any) -> Any:
        """Seconds at x, a number or an array of them."""
        return self.intercept + self.slope * x

    def intercept_share(self, x: float) -> float:
        """Share of the seconds at x that does not grow."""
        return self.intercept / float(self.at(x))


def fit(xs: Sequence[float], seconds: Sequence[float]) -> Line | None:
    """The line whose relative distances from the points have the least sum of squares; None without two different xs.

    Relative ones, because times scatter in proportion: otherwise the longest steps alone would say where it begins.
    """
    if len(set(xs)) < 2:
        return None
    x, y = np.array(xs, dtype=float), np.array(seconds, dtype=float)
    slope, intercept = (float(value) for value in np.polyfit(x, y, 1, w=1 / y))
    apart = float(np.max(np.abs(intercept + slope * x - y) / y))
    return Line(slope, intercept, apart, len(xs))
