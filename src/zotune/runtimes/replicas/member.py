"""A member: a replica that is in step with the others, as the driver sees it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from zotune.rows import Row
from zotune.runtimes import wire
from zotune.runtimes.replicas import shares
from zotune.runtimes.replicas.cluster import Cluster, Lost, Seat, answer
from zotune.runtimes.replicas.history import History
from zotune.runtimes.replicas.replica import PIECE, Introduction


@dataclass
class Traffic:
    """What has travelled between the driver and the replicas: messages as they were serialised.

    Attributes:
        down: Bytes to replicas.
        up: Bytes from them.
    """

    down: int = 0
    up: int = 0


@dataclass
class Figures:
    """How a member does.

    Attributes:
        speed: Tokens per second, as the driver sees them; None before the first answer.
        rows_per_s: Rows per second under one probe each.
        share: Of the tokens of the last question.
        lag: Seconds that its last answer took longer than its work.
    """

    speed: float | None = None
    rows_per_s: float = 0.0
    share: float = 0.0
    lag: float = 0.0


@dataclass(eq=False)
class Member:
    """One replica.

    Attributes:
        number: Its place, which a replacement keeps.
        seat: Where it runs.
        introduction: What it said when it was ready.
        history: That it follows.
        traffic: Counted here.
        told: How many updates of the history it has been told of.
        rows: Numbers of the rows that it has.
        figures: How it does.
        started: Seconds from the wish to have it until it was in step.
    """

    number: int
    seat: Seat
    introduction: Introduction
    history: History
    traffic: Traffic
    told: int = 0
    rows: set[int] = field(default_factory=set)
    figures: Figures = field(default_factory=Figures)
    started: float = 0.0

    def begin(self, method: str, *arguments: Any, rows: Mapping[int, Row] | None = None) -> Any:
        """Ask for a method ``on_...`` of `zotune.runtimes.replicas.replica.Replica`, with what is new before it."""
        updates = self.history.since(self.told)
        new = {number: wire.pack_row(row) for number, row in (rows or {}).items() if number not in self.rows}
        message = pickle.dumps((updates, new, method, arguments), protocol=5)
        begun = self.seat.begin("call", message)
        self.told += len(updates)
        self.rows |= new.keys()
        self.traffic.down += len(message)
        return begun

    def end(self, begun: Any, patience: float | None = None) -> tuple[float, Any]:
        """Seconds of work and the answer to what was begun; raises as `Seat.ask`."""
        packed = answer(begun, patience)
        self.traffic.up += len(packed)
        seconds, found = pickle.loads(packed)
        return seconds, found

    def ask(self, method: str, *arguments: Any, patience: float | None = None) -> Any:
        """Both at once."""
        return self.end(self.begin(method, *arguments), patience)[1]

    def worked(self, tokens: int, rows: int, share: float, took: float, seconds: float) -> None:
        """Note how long its share of a question took, and how much of that was work."""
        figures = self.figures
        figures.speed = shares.measured(figures.speed, tokens, took)
        figures.rows_per_s = shares.measured(figures.rows_per_s or None, rows, took)
        figures.share, figures.lag = share, max(0.0, took - seconds)

    def rested(self, others: float) -> None:
        """Note that a question went without it."""
        self.figures.share = 0.0
        if self.figures.speed is not None:
            self.figures.speed = shares.idle(self.figures.speed, others)

    def about(self) -> dict[str, Any]:
        """How it does, for people."""
        figures = {name: round(value, 4) for name, value in asdict(self.figures).items() if value is not None}
        return {"node": self.seat.node, "pid": self.introduction.pid, **figures, "started": round(self.started, 3)}

    def fetch(self, patience: float) -> dict[str, Tensor]:
        """Its state, in pieces, each of which may take so many seconds; raises as `Seat.ask`."""
        state = {}
        for name, dtype, shape, size in self.ask("state", patience=patience):
            pieces = [self.seat.ask("piece", name, start, patience=patience) for start in range(0, size, PIECE)]
            self.traffic.up += size
            state[name] = wire.tensor([dtype, shape, b"".join(pieces)])
        self.ask("fetched", patience=patience)
        return state


def load(
    seats: Sequence[Seat], cluster: Cluster, state: Mapping[str, Tensor], window: int, patience: float
) -> dict[Seat, Lost]:
    """Give replicas a state, in pieces that travel to each node once; who is lost on the way, and why.

    A replica may take ``patience`` seconds for each.

    Raises:
        JournalError: The tensors are not those of the replicas' layout and method.
        EngineError: Ray's object store is full.
    """
    lost: dict[Seat, Lost] = {}
    for name, tensor in state.items():
        dtype, shape, data = wire.pack_tensor(tensor)
        for start in range(0, max(len(data), 1), PIECE):
            piece = cluster.share(data[start : start + PIECE])
            _ask_all(seats, lost, patience, "put", name, dtype, shape, start, piece)
    _ask_all(seats, lost, patience, "loaded", window)
    return lost


def _ask_all(seats: Sequence[Seat], lost: dict[Seat, Lost], patience: float, method: str, *arguments: Any) -> None:
    """Ask all who are not lost at once; note who is."""
    begun = [(seat, seat.begin(method, *arguments)) for seat in seats if seat not in lost]
    for seat, each in begun:
        try:
            answer(each, patience)
        except Lost as why:
            lost[seat] = why
