"""The board of a run: how its replicas do, and how many there should be, as two small files in its directory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zotune.durable import replace
from zotune.figures import from_json

if TYPE_CHECKING:
    from zotune.runtimes.replicas.team import Team

_EVERY = 1.0
"""Seconds between two lines of figures."""


class Board:
    """Both files.

    Args:
        run: The run's directory; nothing is written until it is there.
    """

    def __init__(self, run: Path) -> None:
        self._run, self._figures, self._wish = run, run / "replicas.json", run / "scale.json"
        self._shown = 0.0
        # What was asked for before counts no more: the configuration has it, and may have been edited since.
        self._past = self._asked()

    def wanted(self) -> int | None:
        """How many replicas `zotune scale` has asked for since this board was made; None if it has not."""
        asked = self._asked()
        return None if asked == self._past else asked[0]

    def want(self, replicas: int) -> None:
        """Ask for so many replicas."""
        replace(self._wish, json.dumps({"replicas": replicas, "asked": time.time_ns()}).encode())

    def _asked(self) -> tuple[int | None, int | None]:
        """The number that was asked for last, and when, in nanoseconds."""
        try:
            found = from_json(self._wish.read_text())
            return int(found["replicas"]), int(found.get("asked", 0))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None, None

    def show(self, team: Team) -> None:
        """Write how the replicas do, if the last time is a second ago."""
        now = time.monotonic()
        if now - self._shown >= _EVERY and self._run.is_dir():
            self._shown = now
            replace(self._figures, json.dumps({"wanted": team.wanted, "replicas": team.figures()}).encode())

    def read(self) -> dict[str, Any]:
        """What `show` wrote last; nothing if it has not."""
        try:
            found: dict[str, Any] = from_json(self._figures.read_text())
        except (OSError, ValueError):
            return {}
        return found
