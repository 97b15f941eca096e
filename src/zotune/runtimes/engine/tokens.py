"""What the tokens of a forward see: which part of a site a module holds, and whose directions each token mixes.

An engine decides where a token lies in a forward, pads the forward, and may capture it as a graph. So every token
carries its own mixture here, in static buffers that all layers read: column 0 is the update that is not in the weights
yet, column j the j-th direction in flight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from zotune.layout import Site
from zotune.protocol import DirectionKey, Probe


@dataclass(frozen=True)
class Part:
    """Where a site lies in a module of the engine, which may hold several sites or a shard of one.

    Attributes:
        site: The site.
        local: Rows of the module's weight, or elements of its vector.
        rows: The site's own rows that these are: a slice, or indices where they are not side by side.
        columns: The site's own columns.
    """

    site: Site
    local: slice
    rows: slice | Tensor
    columns: slice = field(default_factory=lambda: slice(None))

    def of(self, tensor: Tensor) -> Tensor:
        """This part's rows of a tensor whose first axis runs over the site's."""
        return tensor[self.rows]


class TokenMix:
    """How every token of a forward mixes update and directions.

    Args:
        tokens: Most tokens of a forward.
        directions: Most directions in flight.
        dtype: The model's.
        device: Where the model is.

    Attributes:
        mixtures: All that there are, float32 ``(1 + 2 * directions, 1 + directions)``; see `number`.
        which: The number of every token's mixture, int64 ``(tokens,)``.
        exact: Every token's mixture, float32 ``(tokens, 1 + directions)``.
        clean: Whether no token was given any other mixture than that of the update alone.
    """

    def __init__(self, tokens: int, directions: int, dtype: torch.dtype, device: torch.device) -> None:
        self.mixtures = torch.zeros(1 + 2 * directions, 1 + directions, device=device)
        self.mixtures[:, 0] = 1.0
        for column in range(1, 1 + directions):
            for sign in (1, -1):
                self.mixtures[self.number(column, sign), column] = sign
        self.which = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.exact = self.mixtures[self.which]
        self.dtype, self.device, self.clean = dtype, device, True
        self._spread: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @staticmethod
    def number(column: int, sign: int) -> int:
        """Of the mixture of the update and ``sign`` times a column's direction; 0 is the update alone."""
        return 2 * column - (sign > 0) if sign else 0

    @property
    def columns(self) -> int:
        """Of every token's mixture."""
        return self.exact.shape[1]

    def column_of(self, probes: Sequence[Probe]) -> dict[tuple[DirectionKey, float], int]:
        """The column of every direction of these probes.

        Raises:
            ValueError: There are more directions than columns.
        """
        moved = dict.fromkeys((probe.key, probe.eps) for probe in probes if probe.key is not None)
        if len(moved) >= self.columns:
            raise ValueError(f"got {len(moved)} directions at once, room is for {self.columns - 1}")
        return {direction: column for column, direction in enumerate(moved, start=1)}

    def numbers(self, probes: Sequence[Probe]) -> Tensor:
        """The number of the mixture of each probe's tokens, int64 ``(probes,)``; see `number`."""
        columns = self.column_of(probes)
        found = [0 if p.key is None else self.number(columns[p.key, p.eps], p.sign) for p in probes]
        return torch.tensor(found, device=self.device)

    def spread(self, width: int, size: int) -> Tensor:
        """Every token's mixture in the model's dtype, each number so many times, then zeros: ``(tokens, size)``."""
        key = width, size
        if key not in self._spread:
            repeated = self.mixtures.repeat_interleave(width, 1).to(self.dtype)
            mixtures = F.pad(repeated, (0, size - repeated.shape[1]))
            self._spread[key] = mixtures, mixtures[self.which]
        return self._spread[key][1]

    def show(self, numbers: Tensor) -> None:
        """Give the first tokens the mixtures of these numbers, int64."""
        tokens, self.clean = len(numbers), False
        self.which[:tokens] = numbers
        for mixtures, shown in ((self.mixtures, self.exact), *self._spread.values()):
            shown[:tokens] = mixtures[numbers]

    def clear(self, tokens: int) -> None:
        """Make the first tokens clean again: the update alone."""
        self.show(torch.zeros_like(self.which[:tokens]))
        self.clean = True


class TunedVector:
    """Gains or biases ``(n,)`` of a norm, as every token sees them: what they are, plus its mixture of ``phi``."""

    def __init__(self, parts: Sequence[Part], size: int, mix: TokenMix) -> None:
        self.parts, self.mix = tuple(parts), mix
        self.phi = torch.zeros(mix.columns, size, device=mix.exact.device)
        self.keep = torch.ones((), device=mix.exact.device)
        self.decays = False

    def show(self, column: int, factors: Mapping[Site, Tensor]) -> None:
        """Take one column's change of every part."""
        for part in self.parts:
            self.phi[column, part.local] = part.of(factors[part.site])

    @property
    def vectors(self) -> tuple[Part, ...]:
        """The parts that are vectors."""
        return self.parts

    def vector(self) -> Tensor:
        """What is shown of their update, ``(n,)``."""
        return self.phi[0]

    def seen(self, stored: Tensor, tokens: int) -> Tensor:
        """What the first tokens see of what is ``stored``, float32 ``(n,)``: float32 ``(tokens, n)``."""
        # There are few mixtures and many tokens, so every mixture is worked out once.
        of_mixtures = torch.addmm(stored, self.mix.mixtures, self.phi)
        return of_mixtures.index_select(0, self.mix.which[:tokens])
