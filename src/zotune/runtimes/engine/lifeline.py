"""No process outlives the others: a driver notices that its engine died, an engine that its driver did."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from zotune.errors import EngineError

T = TypeVar("T")

_PATIENCE = 0.5
"""Seconds between two looks at the processes while a call lasts."""

_DRIVER = "ZOTUNE_DRIVER"

_GRACE = 5.0
"""Seconds that a dying engine has to say why."""


class Lifeline:
    """Calls an engine whose processes may die in the middle of a call, which vLLM then waits for without end.

    Args:
        processes: The children that the engine consists of; none where it runs in this process.
    """

    def __init__(self, processes: Sequence[Any]) -> None:
        self._processes = tuple(processes)

    @staticmethod
    def around(start: Callable[[], T]) -> tuple[T, Lifeline]:
        """Start an engine; it, and a lifeline to the processes that came with it."""
        before = {child.pid for child in multiprocessing.active_children()}
        engine = start()
        return engine, Lifeline([child for child in multiprocessing.active_children() if child.pid not in before])

    def call(self, act: Callable[[], T]) -> T:
        """What ``act`` gives or raises.

        Raises:
            EngineError: A process died before there was an answer.
        """
        if not self._processes:
            return act()
        outcome: list[Any] = []
        thread = threading.Thread(target=_collect, args=(act, outcome), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_PATIENCE)
            dead = [child for child in self._processes if not child.is_alive()]
            if dead:
                thread.join(_GRACE)
                if thread.is_alive():
                    raise EngineError(f"its process {dead[0].name} ended with exit code {dead[0].exitcode}")
        (value, error), *_ = outcome
        if error is not None:
            raise error
        return cast(T, value)

    def cut(self) -> None:
        """End what is left of the processes."""
        for child in self._processes:
            if child.is_alive():
                child.terminate()
        for child in self._processes:
            child.join(_GRACE)
            if child.is_alive():
                child.kill()


def _collect(act: Callable[[], Any], outcome: list[Any]) -> None:
    try:
        outcome.append((act(), None))
    except BaseException as error:
        outcome.append((None, error))


def driver() -> dict[str, str]:
    """This process, as environment that `follow` finds in those that it starts.

    Not as settings, which vLLM takes into the key of what it compiles: no run would find what an earlier one compiled.
    """
    return {_DRIVER: f"{socket.gethostname()} {os.getpid()}"}


def follow() -> None:
    """In a worker: end this process, and the engine's above it, when the driver's is gone; leave Ctrl-C to the driver.

    A driver that was killed cannot end what it started, and vLLM's processes would go on without it.
    """
    host, pid = os.environ[_DRIVER].split()[0], int(os.environ[_DRIVER].split()[1])
    if host != socket.gethostname() or pid == os.getpid():
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handle = os.pidfd_open(pid)
    above = os.getppid()

    def wait() -> None:
        select.select([handle], [], [])
        if above != pid and os.getppid() == above:
            os.kill(above, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
