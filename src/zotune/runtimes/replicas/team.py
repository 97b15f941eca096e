"""The team: members that work, recruits that are on their way, and what happens when one is lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from zotune.errors import EngineError, ZotuneError, reason
from zotune.runtimes.blueprint import Blueprint
from zotune.runtimes.replicas import member
from zotune.runtimes.replicas.cluster import Cluster, Lost
from zotune.runtimes.replicas.history import History
from zotune.runtimes.replicas.member import Member, Traffic
from zotune.runtimes.replicas.recruit import Recruit, require_same
from zotune.runtimes.replicas.replica import Introduction

_ATTEMPTS = 3
"""Starts that may fail in a row before no replacement is tried any more."""

_LOOK = 0.05
"""Seconds between two looks at recruits, while there is nobody to work."""

_RESUME = "Every finished step is in the journal: `zotune resume` goes on from there."


class Team:
    """Keeps so many replicas in lock-step, whoever of them is lost.

    Args:
        cluster: Where they run.
        blueprint: What each is built from.
        history: That all follow.
        patience: Seconds until a silent member is taken for dead, or the wait for a first one ends.
        tell: Told of losses and arrivals, in one line each.

    Attributes:
        wanted: How many there should be.
        members: Those in step, by number.
        recruits: Those on their way.
        restarts: How often a number has been replaced.
        traffic: What has travelled.
    """

    def __init__(
        self,
        cluster: Cluster,
        blueprint: Blueprint,
        history: History,
        patience: float,
        tell: Callable[[str], None],
    ) -> None:
        self.cluster, self._blueprint, self._history = cluster, blueprint, history
        self._patience, self._tell = patience, tell
        self.members: dict[int, Member] = {}
        self.recruits: dict[int, Recruit] = {}
        self.restarts: Counter[int] = Counter()
        self.traffic = Traffic()
        self.wanted = 0
        self._introduction: Introduction | None = None
        self._failures: list[Exception] = []
        self._known: set[int] = set()

    def start(self, replicas: int) -> Introduction:
        """Start so many replicas; what the first one says of itself.

        Raises:
            ConfigError: The cluster is too small.
            EngineError: A replica died while it started, or is not like the others.
            ZotuneError: What building its runtime raised.
        """
        self.cluster.require(replicas)
        self.wanted = replicas
        self._fill()
        while len(self.members) < replicas:
            for recruit in list(self.recruits.values()):
                recruit.wait()
                self._take_in_first(self.recruits.pop(recruit.number))
            self._fill()
        assert self._introduction is not None
        return self._introduction

    def _take_in_first(self, recruit: Recruit) -> None:
        """Let a first one join; what building its runtime raised is the user's to know at once."""
        if recruit.member is not None:
            self._introduction = self._introduction or recruit.member.introduction
            require_same(recruit.member, self._introduction)
            self._join(recruit)
            return
        assert recruit.error is not None
        if isinstance(recruit.error, ZotuneError):
            raise recruit.error
        self._note_failure(recruit, recruit.error)
        if len(self._failures) >= _ATTEMPTS:
            raise EngineError(f"replica {recruit.number} could not be started: {reason(recruit.error)}")

    def resize(self, replicas: int) -> None:
        """Have another number of replicas from now on; new ones join when they are in step."""
        self.wanted = replicas
        self._failures.clear()
        for number in [number for number in self.recruits if number >= replicas]:
            self.recruits.pop(number).cancel()
        for number in [number for number in self.members if number >= replicas]:
            self.cluster.dismiss(self.members.pop(number).seat)
        self._fill()

    def tend(self) -> None:
        """Between two questions: take in who is ready, and see that nobody is missing.

        Raises:
            EngineError: No replica is left, and none can be started.
        """
        self._welcome()
        self.wait_for_one()

    def _welcome(self) -> None:
        for number in [number for number, recruit in self.recruits.items() if recruit.ready]:
            self._take_in(self.recruits.pop(number))
        self._fill()

    def state(self) -> dict[str, Tensor]:
        """The state that all have, from the first member that lives to give it."""
        while True:
            self.tend()
            chosen = next(iter(self.members.values()))
            try:
                return chosen.fetch(self._patience)
            except Lost as why:
                self.lose(chosen, str(why))

    def load(self, state: Mapping[str, Tensor], window: int) -> None:
        """Have all members go on from a state, with which the history begins anew."""
        self.tend()
        members = list(self.members.values())
        lost = member.load([each.seat for each in members], self.cluster, state, window, self._patience)
        self._history.restart(state, window)
        for each in members:
            each.told = 0
            if each.seat in lost:
                self.lose(each, str(lost[each.seat]))

    def check(self) -> None:
        """Compare the states of all members; who differs from most is replaced."""
        found = self._fingerprints(self.members.values())
        if len(set(found.values())) <= 1:
            return
        (usual, count), *_ = Counter(found.values()).most_common()
        for each, fingerprint in found.items():
            if fingerprint != usual or 2 * count <= len(found):
                self.lose(each, f"its state differs from the others' after {each.told} updates")

    def _fingerprints(self, members: Iterable[Member]) -> dict[Member, str]:
        """Of the states of those who are not lost on the way."""
        found = {}
        for each, begun in [(each, each.begin("fingerprint")) for each in members]:
            try:
                found[each] = each.end(begun, self._patience)[1]
            except Lost as why:
                self.lose(each, str(why))
        return found

    def lose(self, lost: Member, why: str) -> None:
        """Go on without a member, and start another one in its place."""
        self.cluster.dismiss(lost.seat)
        if self.members.get(lost.number) is lost:
            del self.members[lost.number]
            self._tell(f"replica {lost.number} on node {lost.seat.node} is lost: {why}; it is replaced")
        self._fill()

    def _fill(self) -> None:
        """Start who is missing, unless that has failed too often."""
        if len(self._failures) >= _ATTEMPTS:
            return
        for number in range(self.wanted):
            if number not in self.members and number not in self.recruits:
                self.recruits[number] = Recruit(
                    number, self.cluster, self._blueprint, self._history, self.traffic, self._introduction
                )

    def _take_in(self, recruit: Recruit) -> None:
        """Let a recruit that is ready join, or note why it cannot."""
        newcomer = recruit.member
        if newcomer is None or recruit.epoch != self._history.epoch:
            recruit.cancel()
            if recruit.error is not None:
                self._note_failure(recruit, recruit.error)
            return
        found = self._fingerprints([*self.members.values(), newcomer])
        others = {fingerprint for each, fingerprint in found.items() if each is not newcomer}
        if newcomer not in found:
            self._note_failure(recruit, EngineError("it was lost as it joined"))
        elif others and found[newcomer] not in others:
            self.cluster.dismiss(newcomer.seat)
            self._note_failure(recruit, EngineError("its state differs from the others' after the replay"))
        else:
            self.restarts[newcomer.number] += newcomer.number in self._known
            self._join(recruit)
            self._tell(f"replica {newcomer.number} on node {newcomer.seat.node} is in step ({newcomer.started:.1f} s)")

    def _join(self, recruit: Recruit) -> None:
        newcomer = recruit.member
        assert newcomer is not None
        newcomer.started = time.monotonic() - recruit.began
        self._failures.clear()
        self._known.add(newcomer.number)
        self.members[newcomer.number] = newcomer
        self.members = dict(sorted(self.members.items()))

    def _note_failure(self, recruit: Recruit, why: Exception) -> None:
        self._failures.append(why)
        last = "; no other one is tried" if len(self._failures) >= _ATTEMPTS else ""
        self._tell(f"replica {recruit.number} could not be started: {reason(why)}{last}")

    def wait_for_one(self) -> None:
        """Return when there is a member.

        Raises:
            EngineError: None can be started, or the cluster has had no room for one for too long.
        """
        began = time.monotonic()
        while not self.members:
            if not self.recruits and self._failures:
                raise EngineError(
                    f"no replica is left, and {len(self._failures)} could not be started, the last because: "
                    f"{reason(self._failures[-1])}. {_RESUME}"
                )
            homeless = bool(self.recruits) and all(recruit.homeless for recruit in self.recruits.values())
            if homeless and time.monotonic() - began > self._patience:
                raise EngineError(
                    f"no replica is left, and the cluster has had no room of {self.cluster.needs} for another one for "
                    f"{self._patience:.0f} s. {_RESUME}"
                )
            time.sleep(_LOOK)
            self._welcome()

    def figures(self) -> list[dict[str, Any]]:
        """How each replica does, for people."""
        found = {
            number: {"state": "no room" if each.homeless else "starting"} for number, each in self.recruits.items()
        }
        found |= {number: {"state": "in step", **each.about()} for number, each in self.members.items()}
        return [{"replica": number, "restarts": self.restarts[number], **found[number]} for number in sorted(found)]

    def close(self) -> None:
        """End all replicas and let go of the cluster."""
        for recruit in self.recruits.values():
            recruit.cancel()
        self.recruits, self.members = {}, {}
        self.cluster.close()
