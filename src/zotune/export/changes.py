"""What the updates of a run came to, as factors: replay without a forward pass and without folding.

Over the windows w of a run, a site that has ``W`` as its base weight moves to ``keep * W + sum_w B_w V_w^T``. With
stacked factors ``L = [B_1 B_2 ...]`` and ``R = [V_1 V_2 ...]`` the change is ``L R^T``, whose singular values follow
from two QR decompositions and a small matrix:

    L = Q_l T_l,    R = Q_r T_r,    T_l T_r^T = X S Y^T,    L R^T = (Q_l X) S (Q_r Y)^T
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.layout import Site
from zotune.optimizer import Method
from zotune.protocol import Update
from zotune.runtimes.folding.fold import Fold
from zotune.runtimes.folding.move import Move
from zotune.runtimes.spaces.dense import DenseSpace
from zotune.runtimes.spaces.lowrank import LowRankMatrix, LowRankSpace


class Change:
    """How far one site has moved, in whichever form is smaller: factors, or a tensor of the site's shape.

    Attributes:
        keep: What weight decay has left of the base weight.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.shape, self.device, self.keep = shape, device, 1.0
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._dense: Tensor | None = None

    def add(self, change: Tensor, keep: float = 1.0) -> None:
        """Multiply what there is by ``keep`` and add a float32 tensor of the site's shape."""
        self._decay(keep)
        self._dense = self._as_dense().add_(change)

    def add_product(self, left: Tensor, right: Tensor, keep: float = 1.0) -> None:
        """Multiply what there is by ``keep`` and add ``left @ right.T``, float32 ``(out, r)`` and ``(in, r)``."""
        self._decay(keep)
        self._factors.append((left.clone(), right))
        columns = sum(each.shape[1] for each, _ in self._factors)
        if self._dense is not None or columns * sum(self.shape) > self.shape[0] * self.shape[1]:
            self._dense = self._as_dense()

    def decompose(self, weight: Tensor) -> Spectrum:
        """Singular values and vectors of the change of a matrix whose base weight is ``weight`` ``(out, in)``."""
        if self._factors and self.keep == 1.0:
            return Spectrum.of_product(*(torch.cat(side, 1).double() for side in zip(*self._factors, strict=True)))
        dense = self._as_dense().double()
        return Spectrum.of(dense.add_(weight, alpha=self.keep - 1.0) if self.keep != 1.0 else dense)

    def _decay(self, keep: float) -> None:
        if keep == 1.0:
            return
        self.keep *= keep
        self._factors = [(left.mul_(keep), right) for left, right in self._factors]
        if self._dense is not None:
            self._dense.mul_(keep)

    def _as_dense(self) -> Tensor:
        """The tensor, with all factors multiplied out into it."""
        dense = torch.zeros(self.shape, device=self.device) if self._dense is None else self._dense
        for left, right in self._factors:
            dense.addmm_(left, right.T)
        self._factors.clear()
        return dense


@dataclass(frozen=True)
class Spectrum:
    """A singular value decomposition ``left @ diag(values) @ right.T``, in float64.

    Attributes:
        left: ``(out, k)``.
        values: ``(k,)``, falling; those below the precision of float32 beside the largest are zero.
        right: ``(in, k)``.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Spectrum:
        """Of a matrix ``(out, in)``, float64."""
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        floor = values[:1] * torch.finfo(torch.float32).eps
        return cls(left, values.where(values > floor, 0.0), right.T)

    @classmethod
    def of_product(cls, left: Tensor, right: Tensor) -> Spectrum:
        """Of ``left @ right.T``, float64 ``(out, r)`` and ``(in, r)``, without making the product."""
        (left_basis, left_core), (right_basis, right_core) = torch.linalg.qr(left), torch.linalg.qr(right)
        inner = cls.of(left_core @ right_core.T)
        return cls(left_basis @ inner.left, inner.values, right_basis @ inner.right)

    @property
    def rank(self) -> int:
        """Number of singular values that count."""
        return int(self.values.count_nonzero())

    @property
    def norm(self) -> float:
        """Frobenius norm of the matrix."""
        return float(self.values.norm())

    def error(self, rank: int) -> float:
        """Frobenius norm of what the first ``rank`` singular values leave out; none of that rank comes closer."""
        return float(self.values[rank:].norm())

    def sufficient(self, relative: float) -> int:
        """The smallest rank whose error is at most ``relative`` times the norm."""
        left_out = self.values.square().flip(0).cumsum(0).flip(0).sqrt()
        return int((left_out > relative * self.norm).sum())

    def cut(self, rank: int) -> Spectrum:
        """The nearest matrix of at most this rank."""
        return Spectrum(self.left[:, :rank], self.values[:rank], self.right[:, :rank])

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Float32 ``(out, rank)`` and ``(in, rank)`` whose product is the nearest matrix of that rank.

        Both carry the square root of the singular values; columns beyond what there is are zero.
        """
        root = self.values[:rank].sqrt()
        pad = (0, rank - len(root))
        left, right = (torch.nn.functional.pad(side[:, :rank] * root, pad) for side in (self.left, self.right))
        return left.float(), right.float()


class Collector(Fold):
    """Keeps what would go into the weights, and leaves the weights alone."""

    def __init__(self, space: LowRankSpace | DenseSpace) -> None:
        self._space = space
        self.changes = {site: Change(site.shape, space.device) for site in space.sites}

    def add(self, move: Move, step: int) -> None:
        """Take what would move the weight; nothing is rounded, so the step does not matter."""
        state = self._space.sites[move.site]
        if isinstance(state, LowRankMatrix):
            self.changes[move.site].add_product(state.update, state.v, move.keep)
        else:
            self.changes[move.site].add(move.change(slice(None)), move.keep)


@torch.inference_mode()
def collect(weights: Mapping[Site, Tensor], method: Method, seed: int, updates: Iterable[Update]) -> dict[Site, Change]:
    """How far every site moves from its base weight under a run's updates.

    Args:
        weights: The sites and their base weights, which stay as they are.
        method: What made the updates.
        seed: The run's seed.
        updates: All of them, in order.
    """
    # Quantised weights are not there.
    device = next((weight.device for weight in weights.values() if not weight.is_meta), torch.device("cpu"))
    kind = LowRankSpace if method.family == "low-rank" else DenseSpace
    space = kind(tuple(weights), method, seed, device)
    collector = Collector(space)
    for update in updates:
        space.apply(update, weights, collector)
    if isinstance(space, LowRankSpace):
        # The last window is seldom over when the run is.
        for site, state in space.sites.items():
            collector.add(Move(site, weights[site], state.change, state.keep), step=0)
    return collector.changes
