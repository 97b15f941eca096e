"""Where a run stands, as its directory tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zotune import stopping
from zotune.config import Config
from zotune.errors import StopRun
from zotune.journal import read
from zotune.run import RunDirectory

State = Literal["waiting", "interrupted", "finished", "stopped early", "diverged", "failed"]
OVER: tuple[State, ...] = ("finished", "stopped early")
"""States of a run that came to its end."""


@dataclass(frozen=True)
class Standing:
    """A run's state.

    Attributes:
        state: ``waiting`` before it has a directory, ``interrupted`` while it can go on, ``failed`` where ``reason``
            keeps it from that.
        steps: Finished steps.
        reason: Why it failed, where it did.
    """

    state: State
    steps: int = 0
    reason: str | None = None


def standing(run: RunDirectory, config: Config) -> Standing:
    """Where an existing run stands; nothing in its directory changes.

    Args:
        run: Its directory.
        config: What it is to do; a run that another process is at work on looks interrupted.

    Raises:
        JournalError: Its journal cannot be read.
    """
    entries, train = read(run.journal).entries, config.train
    done = len(entries)
    evaluations = run.evaluations(upto=done)
    if done in evaluations:
        if done >= train.steps:
            return Standing("finished", done)
        try:
            stopping.stop_if_stalled(evaluations, train.patience, train.min_delta)
        except StopRun:
            return Standing("stopped early", done)
    if stopping.has_diverged(entries, train.max_skipped):
        return Standing("diverged", done)
    return Standing("interrupted", done)
