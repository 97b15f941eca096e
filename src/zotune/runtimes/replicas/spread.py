"""A question that is answered in parts: who is asked for which, and what happens to the parts of who is lost."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zotune.runtimes.replicas import cluster, shares
from zotune.runtimes.replicas.cluster import Lost
from zotune.runtimes.replicas.member import Member
from zotune.runtimes.replicas.team import Team


@dataclass(frozen=True)
class Part:
    """A piece of a question.

    Attributes:
        tokens: What it costs.
        rows: Rows of it, under one probe each.
        content: What `Spread` passes on.
    """

    tokens: int
    rows: int
    content: Any


Begin = Callable[[Member, list[Any]], Any]
"""Asks a member for parts, given by their content; the answer must be a list with an entry for each."""


@dataclass(frozen=True)
class _Asked:
    member: Member
    parts: list[int]
    began: float


class Spread:
    """Has the parts of one question done by the members of a team, as fast as each of them is.

    Args:
        team: Who does it.
        parts: Of the question.
        begin: Asks a member.
        patience: Seconds until a silent member is taken for dead.
    """

    def __init__(self, team: Team, parts: Sequence[Part], begin: Begin, patience: float) -> None:
        self._team, self._parts, self._begin, self._patience = team, parts, begin, patience
        self._answers: dict[int, Any] = {}
        self._pending: dict[Any, _Asked] = {}
        self._worked: dict[Member, float] = defaultdict(float)

    @property
    def work(self) -> float:
        """Seconds that the member with most to do has worked."""
        return max(self._worked.values(), default=0.0)

    def run(self) -> list[Any]:
        """The answers, in the order of the parts.

        Raises:
            EngineError: No replica is left, and none can be started.
        """
        while len(self._answers) < len(self._parts):
            busy = [asked.member for asked in self._pending.values()]
            idle = [each for each in self._team.members.values() if each not in busy]
            todo = self._todo()
            if todo and idle:
                self._hand_out(todo, idle)
            elif self._pending:
                self._collect()
            else:
                self._team.wait_for_one()
        return [self._answers[index] for index in range(len(self._parts))]

    def _todo(self) -> list[int]:
        """Parts that nobody has done or is asked for."""
        taken = {index for asked in self._pending.values() for index in asked.parts}
        return [index for index in range(len(self._parts)) if index not in self._answers and index not in taken]

    def _hand_out(self, todo: list[int], idle: list[Member]) -> None:
        """Ask idle members for what is to be done."""
        known = [each.figures.speed for each in idle if each.figures.speed is not None]
        usual = sum(known) / len(known) if known else 1.0
        dealt = shares.deal(
            [self._parts[index].tokens for index in todo], [each.figures.speed or usual for each in idle]
        )
        for each, share in zip(idle, dealt, strict=True):
            if not share:
                each.rested(usual)
                continue
            indices = [todo[i] for i in share]
            began = time.perf_counter()
            begun = self._begin(each, [self._parts[index].content for index in indices])
            self._pending[begun] = _Asked(each, indices, began)

    def _collect(self) -> None:
        """Take one answer, or the loss of who should have given it."""
        oldest = min(asked.began for asked in self._pending.values())
        begun = cluster.first(list(self._pending), max(0.0, oldest + self._patience - time.perf_counter()))
        if begun is None:
            begun = next(each for each, asked in self._pending.items() if asked.began == oldest)
            self._team.lose(self._pending.pop(begun).member, f"it gave no answer for {self._patience:.0f} s")
            return
        asked = self._pending.pop(begun)
        try:
            seconds, answers = asked.member.end(begun)
        except Lost as why:
            self._team.lose(asked.member, str(why))
            return
        self._worked[asked.member] += seconds
        self._answers |= dict(zip(asked.parts, answers, strict=True))
        parts = [self._parts[index] for index in asked.parts]
        tokens = sum(part.tokens for part in parts)
        asked.member.worked(
            tokens,
            sum(part.rows for part in parts),
            share=tokens / sum(part.tokens for part in self._parts),
            took=time.perf_counter() - asked.began,
            seconds=seconds,
        )
