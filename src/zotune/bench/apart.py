"""Cases measured in processes of their own, which give all memory back, and whose death is one failed case."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console

from zotune.bench import cases
from zotune.bench.cases import Figures, TimeIsUp
from zotune.bench.plan import Plan, cost
from zotune.bench.results import Case, Result, Results
from zotune.errors import ZotuneError, reason

T = TypeVar("T")

GRACE = 60.0
"""Seconds that a case may overrun the time budget before its process is ended."""


class Apart(Generic[T]):
    """Gives the figures of cases, as `zotune.bench.cases.run` asks for them.

    Args:
        start: Gets ready for a case. It runs in the process, so it must be picklable.
        measure: Gives a case's figures with what ``start`` gave; picklable, too.
        minutes: A case that still runs `GRACE` after so many minutes from now is ended.
        alone: Whether every case has a process. If not, cases that lie side by side and differ in nothing but their
            batch size share one, and what it has got ready.
    """

    def __init__(
        self,
        start: Callable[[Case], T],
        measure: Callable[[T, Case], Figures],
        minutes: float = float("inf"),
        *,
        alone: bool = False,
    ) -> None:
        self._start, self._measure, self._alone = start, measure, alone
        self._until = time.monotonic() + 60 * minutes + GRACE
        self._process: Any = None
        self._shared: Case | None = None

    def __enter__(self) -> Apart[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def measure(self, case: Case) -> Figures:
        """The figures of a case.

        Raises:
            ZotuneError: It failed, or its process died; what it printed went to stderr.
            TimeIsUp: The time is up.
        """
        shared = {name: value for name, value in case.items() if name != "batch_size"}
        if self._process is None or self._alone or shared != self._shared:
            self.close()
            self._open()
            self._shared = shared
        left = max(0.0, self._until - time.monotonic())
        try:
            self._ours.send(case)
            if not self._ours.poll(None if left == float("inf") else left):
                self.close()
                raise TimeIsUp
            figures, failure = self._ours.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            raise ZotuneError(f"its process ended with exit code {code}") from None
        if failure is not None:
            raise ZotuneError(failure)
        return figures

    def _open(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._start, self._measure))
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """End the process, and what it has started."""
        if self._process is None:
            return
        self._ours.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._process = None


def run(
    results: Results,
    wanted: Plan,
    start: Callable[[Case], T],
    measure: Callable[[T, Case], Figures],
    *,
    alone: bool = False,
    minutes: float,
    retry: bool,
    console: Console | None,
) -> list[Result]:
    """What a plan has no results of yet, each apart; see `Apart` and `zotune.bench.cases.run`."""
    with Apart(start, measure, minutes, alone=alone) as processes:
        return cases.run(
            results,
            wanted.cases(),
            processes.measure,
            console=console or Console(),
            cost=cost,
            retry=retry,
            minutes=minutes,
        )


def _serve(theirs: Connection, start: Callable[[Case], T], measure: Callable[[T, Case], Figures]) -> None:
    """The process: take a case, give its figures or say why there are none, and so on."""
    # A group of its own, so that what an engine has started can be ended with it, and Ctrl-C is the parent's to heed.
    os.setsid()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    case = theirs.recv()
    ready, failure = _tried(partial(start, case))
    with suppress(EOFError, BrokenPipeError):
        while True:
            theirs.send(_tried(partial(measure, ready, case)) if failure is None else (None, failure))
            case = theirs.recv()


def _end_with_the_parent() -> None:
    """A parent that was killed cannot end what it has started."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)


def _tried(act: Callable[[], Any]) -> tuple[Any, str | None]:
    """What ``act`` gives, or why it gives nothing."""
    try:
        return act(), None
    except (ZotuneError, RuntimeError, MemoryError) as error:
        why = reason(error)
    # Whatever an engine raises, and a mistake in the benchmark: the trace tells them apart.
    except Exception as error:
        traceback.print_exc()
        why = f"{type(error).__name__}: {reason(error)}"
    # Most likely memory, which a smaller batch may still have enough of.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, why
