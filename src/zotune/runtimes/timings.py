"""Where a runtime's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timings(dict[str, float]):
    """Seconds spent so far, by phase."""

    @classmethod
    def of(cls, *phases: str) -> Timings:
        """Nothing spent on any of these."""
        return cls(dict.fromkeys(phases, 0.0))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count what happens inside."""
        began = time.perf_counter()
        yield
        self[phase] += time.perf_counter() - began
