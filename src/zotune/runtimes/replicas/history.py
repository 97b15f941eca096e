"""History: what every replica's state follows from, a known state and the updates since."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from zotune import checkpoint
from zotune.journal import read
from zotune.protocol import Update
from zotune.run import RunDirectory
from zotune.runtimes import wire


@dataclass(frozen=True)
class Foundation:
    """Where a new replica starts from.

    Attributes:
        count: Updates of the history that are in it.
        state: What to load; None for the base model.
        window: The current one of that state.
    """

    count: int
    state: Mapping[str, Tensor] | None
    window: int


class History:
    """The updates of a run since the state that it began with, a few hundred bytes each.

    Args:
        run: The run's directory, if there is one: a newer checkpoint in it spares a new replica the updates before it.
        bank: See `zotune.checkpoint.newest`.

    Attributes:
        epoch: How often it has begun anew.
    """

    def __init__(self, run: Path | None = None, bank: int = 0) -> None:
        self._run, self._bank = run, bank
        self.epoch = 0
        self.restart(None, 0)

    def restart(self, state: Mapping[str, Tensor] | None, window: int) -> None:
        """Begin with another state; None is the base model."""
        self.epoch += 1
        self._state, self._window = state, window
        self._first: int | None = None
        self._updates: list[bytes] = []

    def __len__(self) -> int:
        return len(self._updates)

    def append(self, update: Update) -> None:
        """One more."""
        if self._first is None:
            self._first = update.step
        self._updates.append(pickle.dumps(wire.pack_update(update), protocol=5))

    def since(self, count: int) -> Sequence[bytes]:
        """The updates after the first ``count``, packed."""
        return self._updates[count:]

    def foundation(self) -> Foundation:
        """The newest state that is at hand."""
        if self._run is not None and self._first is not None:
            run, last = RunDirectory(self._run), self._first + len(self._updates)
            saved = checkpoint.newest(
                run.checkpoints, upto=last, identity=lambda step: read(run.journal).identity(step), bank=self._bank
            )
            if saved is not None and saved[0] > self._first:
                step, window, state = saved
                return Foundation(step - self._first, state, window)
        return Foundation(0, self._state, self._window)


def update(packed: bytes) -> Update:
    """Back from what `History.since` gives."""
    return wire.update(pickle.loads(packed))
