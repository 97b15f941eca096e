"""Real replicas on a real Ray cluster, whose processes are kept warm from one test to the next."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from tiny_checkpoint import write

from zotune.config import ReplicasConfig, RuntimeConfig
from zotune.optimizer import Method
from zotune.runtimes.blueprint import Blueprint
from zotune.runtimes.engine.runtime import Work
from zotune.runtimes.replicas.cluster import Cluster, Lost, Seat
from zotune.runtimes.replicas.runtime import RayRuntime
from zotune.testing import tiny


class LentSeat(Seat):
    """A seat that can be taken back: the thread that starts a replica may still be at work when it is dismissed."""

    def __init__(self, own: Seat) -> None:
        self.own, self.node, self.cores = own, own.node, own.cores
        self._over = False
        self._lock = threading.Lock()

    def begin(self, method: str, *arguments: Any) -> Any:
        with self._lock:
            if self._over:
                raise Lost("its process ended")
            return self.own.begin(method, *arguments)

    def leave(self) -> None:
        with self._lock:
            self._over = True


class WarmCluster(Cluster):
    """Gives the process of a replica that is let go to the next one, because to start one takes seconds."""

    _idle: ClassVar[list[Seat]] = []

    def hire(self, patience: float) -> Seat | None:
        while self._idle:
            seat = self._idle.pop()
            if _answers(seat):
                return self._lend(seat)
        seat = super().hire(patience)
        if seat is None:
            return None
        self._seats.remove(seat)
        return self._lend(seat)

    def _lend(self, seat: Seat) -> Seat:
        lent = LentSeat(seat)
        self._seats.append(lent)
        return lent

    def dismiss(self, seat: Seat) -> None:
        if seat in self._seats:
            assert isinstance(seat, LentSeat)
            self._seats.remove(seat)
            seat.leave()
            self._idle.append(seat.own)


def _answers(seat: Seat) -> bool:
    try:
        seat.ask("shut")
    except Lost:
        seat.leave()
        return False
    return True


@contextmanager
def teams(replicas: int = 2, **options: Any) -> Iterator[Any]:
    """A factory of runtimes for `zotune.testing.conformance`; closes them all at the end.

    Args:
        replicas: Of each.
        options: Keys of the table ``[runtime.ray]``.
    """
    started: list[RayRuntime] = []
    with tempfile.TemporaryDirectory() as folder:

        def start(model: Any, method: Method, *, seed: int = 0, max_tokens: int = 2048) -> RayRuntime:
            config = write(model, Path(folder) / f"model-{len(started)}")
            ray = ReplicasConfig(**options)
            chosen = RuntimeConfig(type=ray.inner, threads=1, max_tokens=max_tokens, ray=ray)
            work = Work(step_tokens=512, longest=tiny.CONTEXT, largest=96)
            blueprint = Blueprint(config, method, seed, chosen, work)
            runtime = RayRuntime(WarmCluster(chosen.ray, cpus=1, shards=1), blueprint, replicas)
            started.append(runtime)
            return runtime

        try:
            yield start
        finally:
            for runtime in started:
                runtime.close()
