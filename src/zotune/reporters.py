"""Reporters: who is told about a run as it goes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from zotune.errors import CallbackError, ConfigError, StopRun, ZotuneError

Record = Mapping[str, Any]
"""One line of ``metrics.jsonl``."""

SCORES = ("accuracy", "f1", "exact_match")
"""Shares that an evaluation may have, all between 0 and 1; the first that is there is what a run is judged by."""


class Reporter(Protocol):
    """Told about a run as it goes; never changes it."""

    def start(self, path: Path, steps: int, done: int) -> None:
        """Training begins.

        Args:
            path: The run directory.
            steps: Steps of the whole run.
            done: Steps that are finished already (more than 0 when a run is resumed).
        """
        ...

    def step(self, record: Record) -> None:
        """A step is finished; ``record`` is its line of ``metrics.jsonl``."""
        ...

    def evaluation(self, record: Record) -> None:
        """An evaluation is finished; ``record`` is its line of ``metrics.jsonl``."""
        ...

    def notice(self, text: str) -> None:
        """Something that the user should know, in one line."""
        ...

    def finish(self) -> None:
        """Training is over, well or not; calling it again changes nothing."""
        ...


class SilentReporter:
    """Says nothing."""

    def start(self, path: Path, steps: int, done: int) -> None:
        """Ignore it."""

    def step(self, record: Record) -> None:
        """Ignore it."""

    def evaluation(self, record: Record) -> None:
        """Ignore it."""

    def notice(self, text: str) -> None:
        """Ignore it."""

    def finish(self) -> None:
        """Ignore it."""


_EVENTS = ("start", "step", "evaluation", "notice", "finish")


class Reporters:
    """Several reporters as one: each is told, in order.

    `StopRun` is passed on when all have been told. Any other failure is passed on at once, with the name of who failed;
    only `finish` reaches everyone in any case.

    Raises:
        ConfigError: One of them is no reporter.
    """

    def __init__(self, *reporters: Reporter) -> None:
        for each in reporters:
            if isinstance(each, type) or not all(callable(getattr(each, name, None)) for name in _EVENTS):
                what = f"the class {each.__name__}" if isinstance(each, type) else repr(each)
                raise ConfigError(
                    f"{what} is no callback: that is an object with the methods {', '.join(_EVENTS)}. Derive one from "
                    "zotune.SilentReporter, which has them all, and give a list of such objects."
                )
        self._reporters = reporters

    def start(self, path: Path, steps: int, done: int) -> None:
        """See `Reporter.start`."""
        self._tell("start", path, steps, done)

    def step(self, record: Record) -> None:
        """See `Reporter.step`."""
        self._tell("step", record)

    def evaluation(self, record: Record) -> None:
        """See `Reporter.evaluation`."""
        self._tell("evaluation", record)

    def notice(self, text: str) -> None:
        """See `Reporter.notice`."""
        self._tell("notice", text)

    def finish(self) -> None:
        """See `Reporter.finish`."""
        with ExitStack() as stack:
            for each in reversed(self._reporters):
                stack.callback(self._call, each, "finish")

    def _tell(self, event: str, *what: Any) -> None:
        stop: StopRun | None = None
        for each in self._reporters:
            try:
                self._call(each, event, *what)
            except StopRun as reason:
                stop = stop or reason
        if stop is not None:
            raise stop

    @staticmethod
    def _call(reporter: Reporter, event: str, *what: Any) -> None:
        try:
            getattr(reporter, event)(*what)
        except ZotuneError:
            raise
        except Exception as error:
            raise CallbackError(
                f"the callback {type(reporter).__name__} failed at {event!r}: {type(error).__name__}: {error}. "
                "The run has every finished step: mend the callback or leave it out, and resume."
            ) from error
