"""What a run tells its user while it works."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from zotune.errors import CallbackError, ConfigError, StopRun, ZotuneError
from zotune.figures import duration, percent

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


class LastingConsole(Console):
    """A console that outlives its reader: once its pipe is closed, as by ``| head``, it is silent and ends nothing."""

    def on_broken_pipe(self) -> None:
        """Say so on stderr, and be quiet from here on."""
        self.quiet = True
        _discard(self.file)
        try:
            print(
                "nobody reads the output any more; the run goes on, and Ctrl-C saves and ends it",
                file=sys.stderr,
                flush=True,
            )
        except BrokenPipeError:
            _discard(sys.stderr)


def _discard(stream: IO[str]) -> None:
    """Send nowhere what a closed pipe did not take, or the process would fail when it flushes that at its end."""
    with suppress(OSError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


class TerminalReporter:
    """One line per evaluation and notice; where something can be redrawn, also the figures of the latest step.

    Args:
        console: Where to write. A terminal gets a live bar, a notebook one line that is replaced, and anything else
            plain lines without control codes.
        clock: Seconds from any origin.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._live: _Bar | _NotebookLine | None = None
        self._steps = self._done = self._first = self._skipped = 0
        self._began: float | None = None
        self._loss: float | None = None
        self._scores: list[str] = []
        self._smoothed_loss = Smoothed()
        self._rows_per_s = Smoothed()

    def start(self, path: Path, steps: int, done: int) -> None:
        """Name the run and open the bar."""
        self._steps, self._done, self._first = steps, done, done
        self.notice(f"run {path}: {steps} steps" + (f", {done} done" if done else ""))
        if self._console.is_jupyter:
            self._live = _NotebookLine(self._clock)
        elif self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = _Bar(self._console, steps)
        self._refresh()

    def step(self, record: Record) -> None:
        """Bring the bar up to date."""
        self._done = record["step"]
        if self._began is None:
            # The evaluation before the first step must not count as a slow step.
            self._began = self._clock() - record["seconds"]
        self._skipped += bool(record["skipped"])
        self._loss = record["loss"]
        self._smoothed_loss.add(record["loss"])
        self._rows_per_s.add(record["rows_per_s"])
        self._refresh()

    def evaluation(self, record: Record) -> None:
        """Print the evaluation's line."""
        self._scores = [
            f"{name.replace('_', ' ')} {percent(record[name])}" for name in SCORES if record.get(name) is not None
        ]
        parts = [f"step {record['step']}/{self._steps}", _loss("loss", record["loss"]), *self._shared_figures()]
        self.notice("  ".join(parts))
        self._refresh()

    def notice(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        if self._console.is_jupyter:
            # Rich would make a block of HTML of each line.
            print(text, file=self._console.file)
        else:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish(self) -> None:
        """Close the bar."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.show(self._done, self._status())

    def _status(self) -> str:
        parts = [f"step {self._done}/{self._steps}", _loss("loss", self._loss)]
        parts += [_loss("smoothed", self._smoothed_loss.value), *self._shared_figures()]
        if self._skipped:
            parts.append(f"{self._skipped} skipped")
        return "  ".join(parts)

    def _shared_figures(self) -> list[str]:
        """Accuracy or what stands for it, speed and time left, as far as they are known."""
        parts = list(self._scores)
        if self._rows_per_s.value is not None:
            parts.append(f"{self._rows_per_s.value:.3g} rows/s")
        if self._began is not None and self._done < self._steps:
            # Wall-clock time per step so far, which counts the evaluations in between.
            pace = (self._clock() - self._began) / (self._done - self._first)
            parts.append(f"{duration(pace * (self._steps - self._done))} left")
        return parts


class _Bar:
    """A terminal's last line: the status, and a bar where there is room for it."""

    def __init__(self, console: Console, steps: int) -> None:
        status = TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True, overflow="crop"))
        # On a narrow terminal the figures matter more than the bar.
        columns = (status, BarColumn(bar_width=None)) if console.width >= 110 else (status,)
        self._progress = Progress(*columns, console=console, expand=True)
        self._task = self._progress.add_task("", total=steps, status="")
        self._progress.start()

    def show(self, done: int, status: str) -> None:
        """Draw it anew."""
        self._progress.update(self._task, completed=done, status=status)

    def stop(self) -> None:
        """Leave it as it is and give the terminal back."""
        self._progress.stop()


class _NotebookLine:
    """One line of a notebook cell's output, replaced in place, so that a converted notebook keeps the last one."""

    SECONDS = 0.25
    """Between replacements: each is a message to the browser."""

    def __init__(self, clock: Callable[[], float]) -> None:
        from IPython.display import display

        self._clock = clock
        self._shown_at = clock()
        self._status = ""
        self._line = display(_plain(""), raw=True, display_id=True)

    def show(self, done: int, status: str) -> None:
        """Replace the line, unless that was a moment ago."""
        self._status = status
        if self._clock() - self._shown_at >= self.SECONDS:
            self._replace()

    def stop(self) -> None:
        """Bring the line up to date."""
        self._replace()

    def _replace(self) -> None:
        self._shown_at = self._clock()
        self._line.update(_plain(self._status), raw=True)


def _plain(text: str) -> dict[str, str]:
    """A notebook's bundle of plain text."""
    return {"text/plain": text}


def _loss(label: str, value: float | None) -> str:
    return f"{label} {'-' if value is None else format(value, '.3f')}"
