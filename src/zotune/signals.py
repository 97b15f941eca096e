"""Ctrl-C and SIGTERM: heeded between two steps while a run trains, and at once before and after."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Terminated(SystemExit):
    """SIGTERM ended the run; unless caught, the process exits with the shell's code for it, 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


_OUTCOMES: dict[int, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


class Interrupted(BaseException):
    """A signal asks a run to end, at a moment when its state is whole.

    Attributes:
        outcome: What to raise once the state is saved.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.outcome = _OUTCOMES[number]()


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` here, as Ctrl-C raises KeyboardInterrupt; where and how, see `Signals`."""
    before = signal.getsignal(signal.SIGTERM)
    # Ray, for one, leaves a handler behind that exits without a word.
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, _: FrameType | None) -> None:
    raise _OUTCOMES[number]()


class Signals:
    """A context in which the first signal waits for `heed`; the second one ends the run where it stands.

    Handlers are installed in the main thread only, which alone may; a signal that was ignored stays ignored, and at the
    end all handlers are what they were.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._idle = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in _OUTCOMES:
                # None: installed by something that is not Python and could not be put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def heed(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self._received is not None:
            raise Interrupted(self._received)

    @contextmanager
    def idle(self) -> Iterator[None]:
        """What may be cut short, because it changes nothing: a signal raises `Interrupted` at once."""
        self.heed()
        self._idle = True
        try:
            yield
        finally:
            self._idle = False

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._received is not None:
            raise _OUTCOMES[number]()
        self._received = number
        if self._idle:
            raise Interrupted(number)
