"""Units: the pieces that a step is cut into, the same whoever computes them and however many replicas there are.

A unit is a block of the grid of probes and rows. One forward of the same shape on the same kind of machine gives the
same bits, so scores do not depend on who has which unit; hence the cut follows from probes, rows and settings alone.

What a cut costs decides where ``auto`` makes it. Between directions it is free: each is drawn once. Between plus and
minus it costs a second draw. Between rows it costs another draw of all the unit's directions for each part, so rows are
cut last, where one direction alone is more than a unit should be. A forward has a cost of its own, so small directions
go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from zotune.protocol import Probe
from zotune.rows import Row
from zotune.runtimes.packing import cut


@dataclass(frozen=True)
class Unit:
    """A block of the grid.

    Attributes:
        probes: Which probes.
        rows: Which rows.
        tokens: Tokens of its forward, all probes counted.
    """

    probes: slice
    rows: slice
    tokens: int


def plan(probes: Sequence[Probe], rows: Sequence[Row], *, split: str, unit_tokens: int) -> list[Unit]:
    """Cut a question into units.

    Args:
        probes: At least one.
        rows: At least one.
        split: ``direction``, ``sign`` or ``rows``, or ``auto``: by direction, small ones together.
        unit_tokens: Most tokens of a unit; a single row may have more.
    """
    tokens = [row.n_tokens for row in rows]
    return [
        Unit(group, part, (group.stop - group.start) * sum(tokens[part]))
        for group in _groups(probes, sum(tokens), split, unit_tokens)
        for part in cut(tokens, unit_tokens // (group.stop - group.start))
    ]


def _groups(probes: Sequence[Probe], tokens: int, split: str, unit_tokens: int) -> Iterator[slice]:
    """Consecutive probes that belong together."""
    if split == "rows":
        yield slice(0, len(probes))
        return
    if split == "sign":
        yield from (slice(i, i + 1) for i in range(len(probes)))
        return
    sizes = [len(list(same)) for _, same in groupby(probes, key=lambda probe: probe.key)]
    # Those of a direction stay together, however large they are.
    budget = unit_tokens if split == "auto" else 0
    start = 0
    for together in cut([size * tokens for size in sizes], budget):
        size = sum(sizes[together])
        yield slice(start, start + size)
        start += size


def join(units: Sequence[Unit], parts: Sequence[np.ndarray], probes: int, rows: Sequence[Row]) -> np.ndarray:
    """The scores of a whole question from those of its units.

    Args:
        units: Of `plan`.
        parts: float32, each ``(probes, candidates)`` of its unit.
        probes: How many there are in all.
        rows: All of them.

    Returns:
        float32 ``(probes, candidates)``.
    """
    ends = np.cumsum([0, *(len(row.candidates) for row in rows)])
    scores = np.empty((probes, ends[-1]), dtype=np.float32)
    for unit, part in zip(units, parts, strict=True):
        scores[unit.probes, ends[unit.rows.start] : ends[unit.rows.stop]] = part
    return scores
