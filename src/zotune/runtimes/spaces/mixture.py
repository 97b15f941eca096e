"""What every space of perturbations shares: how blocks mix directions, and how vectors are shifted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.protocol import DirectionKey, Probe
from zotune.transfer import onto

Lookup = Callable[[Tensor], Tensor]
"""A module's own embedding with another table ``(vocabulary, n)``, for all tokens of the pack: ``(..., n)``."""


@dataclass(frozen=True)
class Mixture:
    """How the blocks of a pack mix the accumulated update and the directions; the same for every site.

    Attributes:
        weights: float32 ``(blocks, 1 + directions)``: 1 for the update, ``sign * eps`` for the probe's direction.
        picked: The direction of each block, int64 ``(blocks,)``; 0 for a clean block.
        amounts: ``sign * eps`` of each block, float32 ``(blocks, 1)``; 0 for a clean block.
    """

    weights: Tensor
    picked: Tensor
    amounts: Tensor

    @classmethod
    def of(cls, probes: Sequence[Probe], keys: Sequence[DirectionKey], device: torch.device) -> Mixture:
        """The mixture of these probes, whose directions are ``keys``."""
        picked = torch.tensor([0 if probe.key is None else keys.index(probe.key) for probe in probes])
        amounts = torch.tensor([0.0 if probe.key is None else probe.sign * probe.eps for probe in probes])
        weights = torch.zeros(len(probes), 1 + len(keys))
        weights[:, 0] = 1.0
        if keys:
            weights[torch.arange(len(probes)), 1 + picked] = amounts
        return cls(onto(weights, device), onto(picked, device), onto(amounts.view(-1, 1), device))

    def copy_(self, other: Mixture) -> None:
        """Take the numbers of another mixture of as many blocks and directions."""
        self.weights.copy_(other.weights)
        self.picked.copy_(other.picked)
        self.amounts.copy_(other.amounts)


def grouped(probes: Sequence[Probe], most: int, directions: float) -> Iterator[list[Probe]]:
    """Cut probes into parts that go into one forward: one or more, at most so many, of at most so many directions."""
    part: list[Probe] = []
    moved: set[tuple[DirectionKey, float]] = set()
    for probe in probes:
        own = set() if probe.key is None else {(probe.key, probe.eps)}
        if part and (len(part) >= most or len(moved) + len(own - moved) > directions):
            yield part
            part, moved = [], set()
        part.append(probe)
        moved |= own
    yield part


class Vector:
    """A bias or norm gain ``(n,)`` as every block sees it: as stored, plus ``shift``.

    Attributes:
        update: float32 ``(n,)``: B, a view of the space's flat buffer.
        shift: float32 ``(blocks, n)``.
        moves: Whether it is the site's turn; the shift is zero otherwise.
    """

    shift: Tensor

    def __init__(self, update: Tensor) -> None:
        self.update = update
        self.keep, self.moves = 1.0, True

    def change(self, rows: slice) -> Tensor:
        """The accumulated update of some elements, float32."""
        return self.update[rows]
