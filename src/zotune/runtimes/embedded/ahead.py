"""Getting ready for the next step while a GPU works on this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zotune.directions import LowRankDirections
from zotune.protocol import Probe
from zotune.rows import Row
from zotune.runtimes.packing import Pack


class Ahead:
    """Packs rows, and makes what is expected to be asked for next before it is.

    Args:
        pack: Packs rows for normalised scores or others.
        directions: That probes draw.
    """

    def __init__(self, pack: Callable[[Sequence[Row], bool], Pack], directions: LowRankDirections) -> None:
        self._pack, self._directions = pack, directions
        self._expected: tuple[Sequence[Probe], list[Row], bool] | None = None
        self._made: tuple[list[Row], bool, Pack] | None = None

    def expect(self, probes: Sequence[Probe], rows: Sequence[Row], normalised: bool) -> None:
        """Remember what will be asked for; see `zotune.runtimes.base.Foresees.expect`."""
        self._expected = probes, list(rows), normalised

    def get_ready(self) -> None:
        """Make what is expected."""
        if self._expected is None:
            return
        (probes, rows, normalised), self._expected = self._expected, None
        self._directions.expect([probe.key for probe in probes if probe.key is not None])
        self._made = rows, normalised, self._pack(rows, normalised)

    def pack(self, rows: Sequence[Row], normalised: bool) -> Pack:
        """The pack of these rows, which may be there already."""
        if self._made is not None and self._made[:2] == (list(rows), normalised):
            return self._made[2]
        return self._pack(rows, normalised)
