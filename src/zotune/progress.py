"""What a run shows on a terminal, in a notebook or in a log while it works."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from zotune.figures import Smoothed, counted, duration, percent
from zotune.reporters import SCORES, Record


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
        self.notice(f"run {path}: {counted(steps, 'step')}" + (f", {done} done" if done else ""))
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
