"""Figures as people read them, and as JSON takes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def percent(share: float) -> str:
    """``0.783`` as ``78.3 %``."""
    return f"{100 * share:.1f} %"


def counted(number: int, noun: str) -> str:
    """``1 step``, ``2 steps``: a number of what has a regular plural."""
    return f"{number} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def elapsed(seconds: float) -> str:
    """As `duration`, but for short ones in seconds, or in milliseconds."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def size(count: float) -> str:
    """Bytes as ``12.3 MB``."""
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def finite(value: float) -> float | None:
    """The number itself, or None: JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def from_json(text: str | bytes) -> Any:
    """What a text in JSON stands for.

    Raises:
        ValueError: It is no JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def as_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with None for numbers that are not finite, however deep in it they are."""
    return {name: _as_json(value) for name, value in record.items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return as_json(value)
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    return finite(value) if isinstance(value, float) else value


class Smoothed:
    """Exponential moving average with the bias of its start corrected, as Adam does (Kingma & Ba 2015, section 3).

    After n values it is the average with weights ``decay ** (n - i)`` for value i, so the first value is returned as
    it is. Values that are missing or not finite are left out.
    """

    def __init__(self, decay: float = 0.95) -> None:
        self._decay = decay
        self._total = 0.0
        self._weight = 0.0

    def add(self, value: float | None) -> float | None:
        """Take in a value; return the average so far, None while there is none."""
        if value is not None and math.isfinite(value):
            self._total = self._decay * self._total + value
            self._weight = self._decay * self._weight + 1
        return self.value

    @property
    def value(self) -> float | None:
        """The average so far."""
        return self._total / self._weight if self._weight else None
