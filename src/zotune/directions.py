"""Directions: the unit perturbation of every site, drawn from a key.

Two families share one vocabulary. A *low-rank* direction of a matrix is ``scale * U V^T`` (Chen et al. 2025, LOZO;
Li and Ding 2026 with a scale of ``1 / sqrt(r)``), where V is fixed for a window. A *dense* direction is one variate
per weight (Malladi et al. 2023, MeZO). Vectors (biases, norm gains) are dense in both. Sites may take turns, a window
each (`zotune.layout.Site.turn`): a direction is zero where it is not a site's turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from zotune.layout import Site, period
from zotune.noise import Distribution, NoiseBlock
from zotune.protocol import DirectionKey


class LowRankDirections:
    """Draws U (or z, for a vector) per direction and V per window.

    Args:
        sites: The sites of the layout, in order.
        seed: The run's seed.
        rank: Columns of U and V.
        scale: Factor of the direction; it is carried by V.
        distribution: Of the elements of U, V and z.
        device: Where to draw.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        seed: int,
        rank: int,
        scale: float = 1.0,
        distribution: Distribution = "normal",
        device: torch.device | str = "cpu",
    ) -> None:
        self.sites, self.seed, self.rank, self.scale = tuple(sites), seed, rank, scale
        matrices = [site for site in sites if site.is_matrix]
        self.factors = NoiseBlock(
            [site.name for site in sites],
            [(site.shape[0], rank) if site.is_matrix else site.shape for site in sites],
            distribution,
            device,
        )
        self._expected: dict[DirectionKey, Tensor] = {}
        self._waiting = [self._waiting_in(window) for window in range(period(sites))]
        self._v = NoiseBlock([s.name for s in matrices], [(s.shape[1], rank) for s in matrices], distribution, device)

    def draw(self, key: DirectionKey) -> Tensor:
        """U and z of all sites as one flat float32 tensor; ``factors.views`` cuts it into ``(out, r)`` and ``(n,)``."""
        return self._turned(self.factors.draw(self._name(key)), key.window)

    def streams(self, key: DirectionKey) -> Tensor:
        """What `drawn` makes this direction from: int64 ``(2, sites)`` on the CPU; see `NoiseBlock.streams`."""
        made = self._expected.get(key)
        return self.factors.streams(self._name(key)) if made is None else made

    def expect(self, keys: Iterable[DirectionKey]) -> None:
        """Get ready what `streams` will be asked for next."""
        self._expected = {key: self.factors.streams(self._name(key)) for key in keys}

    def drawn(self, given: Tensor, window: int) -> Tensor:
        """What `draw` gives for a key of this window, in operations on the device alone; see `NoiseBlock.drawn`."""
        return self._turned(self.factors.drawn(given), window)

    def _name(self, key: DirectionKey) -> str:
        return f"U/{self.seed}/{key.step}/{key.index}"

    def _turned(self, drawn: Tensor, window: int) -> Tensor:
        waiting = self._waiting[window % len(self._waiting)]
        return drawn if waiting is None else drawn.masked_fill_(waiting, 0)

    def _waiting_in(self, window: int) -> Tensor | None:
        """Where a draw is of sites whose turn it is not, bool ``(size,)``; None if it is everybody's."""
        if all(site.moves(window) for site in self.sites):
            return None
        waiting = torch.zeros(self.factors.size, dtype=torch.bool)
        for site, view in zip(self.sites, self.factors.views(waiting), strict=True):
            view.fill_(not site.moves(window))
        return waiting.to(self.factors.device)

    def window(self, index: int) -> list[Tensor | None]:
        """V of every matrix, float32 ``(in, r)`` with the scale applied; None for a vector."""
        drawn = iter(self._v.views(self._v.draw(f"V/{self.seed}/{index}").mul_(self.scale)) if self._v.shapes else ())
        return [next(drawn) if site.is_matrix else None for site in self.sites]

    def dense(self, key: DirectionKey) -> list[Tensor]:
        """The whole direction, float32, one tensor of each site's shape."""
        factors = self.factors.views(self.draw(key))
        return [u if v is None else u @ v.T for u, v in zip(factors, self.window(key.window), strict=True)]


class DenseDirections:
    """Draws one variate per weight, one site at a time, so that a whole direction never has to exist at once."""

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        seed: int,
        distribution: Distribution = "normal",
        device: torch.device | str = "cpu",
    ) -> None:
        self.sites, self.seed = tuple(sites), seed
        self._blocks = {site.name: NoiseBlock([site.name], [site.shape], distribution, device) for site in sites}

    def draw(self, key: DirectionKey, site: Site) -> Tensor:
        """The direction at one site, float32, of its shape."""
        block = self._blocks[site.name]
        if not site.moves(key.window):
            return torch.zeros(site.shape, device=block.device)
        return block.views(block.draw(f"z/{self.seed}/{key.step}/{key.index}"))[0]

    def dense(self, key: DirectionKey) -> list[Tensor]:
        """The whole direction, float32, one tensor of each site's shape."""
        return [self.draw(key, site) for site in self.sites]


Directions = LowRankDirections | DenseDirections
