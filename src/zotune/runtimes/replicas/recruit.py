"""A recruit: a replica that is being started, in a thread of its own, while the others work."""

from __future__ import annotations

import threading
import time

from zotune.errors import EngineError
from zotune.runtimes.blueprint import Blueprint
from zotune.runtimes.replicas import member
from zotune.runtimes.replicas.cluster import Cluster, Seat
from zotune.runtimes.replicas.history import History
from zotune.runtimes.replicas.member import Member, Traffic
from zotune.runtimes.replicas.replica import Introduction

_LOOK = 2.0
"""Seconds between two looks at whether it is still wanted, while there is no room for it."""


class Recruit:
    """Finds room, loads the model, takes the newest state at hand and replays the updates since.

    Args:
        number: Its place.
        cluster: Where.
        blueprint: What its runtime is built from.
        history: What it is to catch up with.
        traffic: Counts what travels.
        expected: What the first replica said, which this one must agree with; None for the first ones.

    Attributes:
        member: What became of it, once it is ready.
        error: Why nothing did.
        homeless: Whether it waits for room in the cluster.
    """

    def __init__(
        self,
        number: int,
        cluster: Cluster,
        blueprint: Blueprint,
        history: History,
        traffic: Traffic,
        expected: Introduction | None,
    ) -> None:
        self.number, self.began = number, time.monotonic()
        self.member: Member | None = None
        self.error: Exception | None = None
        self.homeless = False
        self.epoch = history.epoch
        self._cluster, self._blueprint, self._history, self._traffic = cluster, blueprint, history, traffic
        self._expected, self._unwanted = expected, False
        self._seat: Seat | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether it has come to an end, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Return when it is ready."""
        self._thread.join()

    def cancel(self) -> None:
        """It is not wanted any more."""
        self._unwanted = True
        if self._seat is not None:
            self._cluster.dismiss(self._seat)

    def _run(self) -> None:
        try:
            self.member = self._start()
        except Exception as error:
            self.error = error
            self.cancel()

    def _start(self) -> Member | None:
        if (seat := self._find_room()) is None:
            return None
        introduction = seat.ask("open", self._blueprint, seat.cores)
        found = Member(self.number, seat, introduction, self._history, self._traffic)
        if self._expected is not None:
            require_same(found, self._expected)
        foundation = self._history.foundation()
        if foundation.state is not None:
            patience = self._blueprint.options.ray.patience
            for why in member.load([seat], self._cluster, foundation.state, foundation.window, patience).values():
                raise why
        found.told = foundation.count
        found.ask("nothing")
        return found

    def _find_room(self) -> Seat | None:
        while not self._unwanted:
            self._seat = self._cluster.hire(_LOOK)
            self.homeless = self._seat is None
            if self._seat is not None:
                if self._unwanted:
                    self._cluster.dismiss(self._seat)
                    return None
                return self._seat
        return None


def require_same(found: Member, expected: Introduction) -> None:
    """Make sure that a replica computes the same bits as the others.

    Raises:
        EngineError: A trait differs; the message says which, and what it is on either side.
    """
    for name, value in expected.traits.items():
        own = found.introduction.traits.get(name)
        if own != value:
            raise EngineError(
                f"replica {found.number} on node {found.seat.node} is not like the others: its {name} is "
                f"{own!r}, theirs {value!r}. All nodes need the same packages, model files and kind of device, or the "
                "result would depend on who computes what."
            )
