"""What the blocks of a pack see of all low-rank sites, in a few flat buffers that stay where they are.

A step writes new numbers into them with a handful of operations, however many sites there are, and what a site sees is
a view that was made once. A CUDA graph finds them where they were when it was captured
(`zotune.runtimes.embedded.graphs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zotune.directions import LowRankDirections
from zotune.layout import Site
from zotune.noise import NoiseBlock
from zotune.protocol import DirectionKey, Probe
from zotune.runtimes.spaces.appended import AppendedProduct, Beside
from zotune.runtimes.spaces.mixture import Mixture, Vector
from zotune.runtimes.spaces.skinny import SkinnyProduct
from zotune.transfer import onto

if TYPE_CHECKING:
    from zotune.runtimes.spaces.lowrank import LowRankMatrix


@dataclass(frozen=True)
class MatrixView:
    """What a matrix's blocks see.

    Attributes:
        shift: What a probe adds, float32 ``(blocks, out, r)``.
        directions: U of each direction, float32 ``(out, r)``.
        mix: How the blocks mix B and the directions.
    """

    shift: Tensor
    directions: tuple[Tensor, ...]
    mix: Mixture


class Stage:
    """The buffers of so many blocks and directions.

    Args:
        sites: And their states, in order.
        drawing: Draws the directions; B is as flat as they are.
        blocks: Of a pack.
        directions: Between all blocks.
        dtype: What linear layers multiply in.

    Attributes:
        given: What the directions that were taken are drawn from, int64 ``(directions, 2, sites)`` on the CPU; see
            `zotune.noise.NoiseBlock.streams`.
    """

    def __init__(
        self,
        sites: Mapping[Site, LowRankMatrix | Vector],
        drawing: LowRankDirections,
        blocks: int,
        directions: int,
        dtype: torch.dtype,
    ) -> None:
        layout = drawing.factors
        device = layout.device
        self._drawing = drawing
        self._states = list(sites.values())
        self._pattern: list[tuple[int | None, int, float]] = []
        self._mix = Mixture(
            torch.zeros(blocks, 1 + directions, device=device),
            torch.zeros(blocks, dtype=torch.int64, device=device),
            torch.zeros(blocks, 1, device=device),
        )
        self.given = torch.zeros(0, 2, len(layout.shapes), dtype=torch.int64)
        self._directions = torch.zeros(max(1, directions), layout.size, device=device)
        self._drawn = list(self._directions[:directions])
        self._shift = torch.zeros(blocks, layout.size, device=device)
        places = dict(zip(self._states, layout.views(torch.arange(layout.size)), strict=True))
        owned = (state.product for state in self._states if not isinstance(state, Vector))
        every = dict.fromkeys(product for product in owned if product.staged)
        appended = [product for product in every if isinstance(product, AppendedProduct)]
        self._beside = Beside(appended, self._states, layout, self._mix, dtype)
        products = [product for product in every if isinstance(product, SkinnyProduct)]
        matrices = [_order(product, places, layout.size).flatten() for product in products]
        vectors = [places[state] for state in self._states if isinstance(state, Vector)]
        self._matrix_order = torch.cat(matrices).to(device) if matrices else None
        self._vector_order = torch.cat(vectors).to(device) if vectors else None
        self._factors = torch.zeros(blocks, sum(map(len, matrices)), dtype=dtype, device=device)
        self._shown = torch.zeros(blocks, sum(map(len, vectors)), device=device)
        self._views = self._seen(layout)
        parts = zip(products, self._factors.split(list(map(len, matrices)), dim=1), strict=True)
        self._multiplied = {product: part.unflatten(1, product.shape) for product, part in parts}

    def _seen(self, layout: NoiseBlock) -> list[Any]:
        """What each site sees, in order: a `MatrixView`, or a vector's shift, float32 ``(blocks, n)``."""
        shifts = layout.views(self._shift)
        drawn = list(zip(*map(layout.views, self._drawn), strict=True))
        vectors = iter(self._shown.split([len(s.update) for s in self._states if isinstance(s, Vector)], dim=1))
        return [
            next(vectors)
            if isinstance(state, Vector)
            else MatrixView(shifts[at], tuple(drawn[at]) if drawn else (), self._mix)
            for at, state in enumerate(self._states)
        ]

    def enter(self) -> None:
        """Let every site see this stage."""
        for state, view in zip(self._states, self._views, strict=True):
            if isinstance(state, Vector):
                # All blocks see the same where it is not the site's turn, and there may be only one of them.
                state.shift = view if state.moves else view[:1]
            else:
                state.shown = view
        for product, factors in self._multiplied.items():
            product.factors = factors
        self._beside.enter()

    def take(self, probes: Sequence[Probe], keys: Sequence[DirectionKey]) -> dict[DirectionKey, Tensor]:
        """Take this step's probes, which `show` then shows.

        Args:
            probes: One per block.
            keys: Of their directions.

        Returns:
            Where each direction will be, flat.
        """
        order: dict[DirectionKey | None, int] = {key: index for index, key in enumerate(keys)}
        pattern = [(order.get(probe.key), probe.sign, probe.eps) for probe in probes]
        if pattern != self._pattern:
            # Almost every step mixes its directions as the one before did.
            self._mix.copy_(Mixture.of(probes, keys, self._shift.device))
            self._beside.mix()
            self._pattern = pattern
        if keys:
            self.given = torch.stack([self._drawing.streams(key) for key in keys])
        return dict(zip(keys, self._drawn, strict=True))

    def show(self, update: Tensor, window: int, given: Tensor | None = None) -> None:
        """Let the blocks see the probes that were taken.

        Args:
            update: B of all sites, flat.
            window: The current one.
            given: The attribute, on the device, so that all of this is operations there alone; None brings it there.
        """
        given = onto(self.given, update.device) if given is None else given
        for streams, direction in zip(given, self._drawn, strict=True):
            direction.copy_(self._drawing.drawn(streams, window))
        torch.index_select(self._directions, 0, self._mix.picked, out=self._shift).mul_(self._mix.amounts)
        if self._matrix_order is not None:
            dtype = self._factors.dtype
            zero = self._factors.new_zeros(len(self._shift), 1)
            both = torch.cat([update.to(dtype).expand_as(self._shift), self._shift.to(dtype), zero], 1)
            # A block at a time, because a CPU gathers along one dimension alone four times as fast.
            for seen, factors in zip(both, self._factors, strict=True):
                torch.index_select(seen, 0, self._matrix_order, out=factors)
        self._beside.show(update, self._directions)
        if self._vector_order is not None:
            torch.index_select(self._shift, 1, self._vector_order, out=self._shown)
            self._shown.add_(update.index_select(0, self._vector_order))


def _order(product: SkinnyProduct, places: Mapping[LowRankMatrix | Vector, Tensor], size: int) -> Tensor:
    """Where a product's factors lie in flat B, flat shift and a zero, one behind the other; int32 ``(rows, out)``."""
    # Half the bytes of the usual indices, of which a gather reads more than of what it gathers.
    order = torch.full(product.shape, 2 * size, dtype=torch.int32)
    for member, rows, outputs in product.parts():
        at = places[member].T
        own = [at, at + size]
        if member.bias is not None:
            bias = places[member.bias].unsqueeze(0)
            own += [bias, bias + size]
        order[rows, outputs] = torch.cat(own)
    return order
