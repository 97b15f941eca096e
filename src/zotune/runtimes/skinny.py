"""The skinny product: what a perturbation adds to an ordinary product, for matrices that take the same input.

Of one matrix it is ``P sum_j mix[k, j] Phi_j^T`` with ``P = x V`` (`zotune.runtimes.lowrank`). Matrices side by side,
whose outputs follow each other, have their V side by side too, and their factors in blocks along a diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from zotune.runtimes.lowrank import LowRankMatrix

_ALIGNED = {"cuda": 8}
"""A GPU's products of 16-bit numbers are several times slower where an extent is no multiple of this."""


class SkinnyProduct:
    """The product of all blocks with matrices side by side, perturbation included.

    Args:
        members: The matrices, of the same width; weight decay leaves the same of each.
        terms: Of a member's factors: B, and what a probe adds to it.

    Attributes:
        factors: ``(blocks, rows, out)`` in the products' dtype, once there was a probe: of every member B, then what a
            probe adds to it, which in 16 bits their sum would round away; two more rows, alike, if it carries a bias.
        staged: Whether a stage makes ``factors`` ready; a head, which is asked for some outputs, gathers those itself.
    """

    factors: Tensor

    def __init__(self, members: Sequence[LowRankMatrix], terms: int = 2) -> None:
        self.members, self.terms, self.staged = tuple(members), terms, False
        self._projectors: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of ``factors``, with what fills them up for a GPU's products, and outputs."""
        step = _ALIGNED.get(self.members[0].update.device.type, 1)
        return -(-self.needed // step) * step, sum(len(member.update) for member in self.members)

    @property
    def needed(self) -> int:
        """Rows of ``factors`` that are not filled up."""
        return self.terms * sum(member.width for member in self.members)

    def parts(self) -> Iterator[tuple[LowRankMatrix, slice, slice]]:
        """Every member with its own rows of ``factors`` and its own outputs."""
        row, output = 0, 0
        for member in self.members:
            rows = slice(row, row + self.terms * member.width)
            outputs = slice(output, output + len(member.update))
            yield member, rows, outputs
            row, output = rows.stop, outputs.stop

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """``x_k W_k^T + bias`` of every block.

        Args:
            x: ``(blocks, tokens, in)``.
            weight: ``(out, in)``, or only the ``rows`` of it; in the dtype of x.
            bias: ``(out,)`` or None.
            rows: Output rows that ``weight`` holds, of a matrix that has no neighbours; None for all.
        """
        keep = self.members[0].keep
        if not any(member.moves for member in self.members):
            return plain(x, weight, bias, keep)
        factors = self.factors if self.staged else self._gathered(rows)
        projected = F.linear(x, *self.projector(x.dtype))
        if bias is not None:
            return plain(x, weight, bias, keep).baddbmm_(projected, factors)
        # The large product is added to the small one before it is rounded: the other way round would round twice.
        y = projected @ factors
        y.flatten(0, 1).addmm_(x.flatten(0, 1), weight.T, alpha=keep)
        return y

    def _gathered(self, rows: Tensor | None) -> Tensor:
        """The factors of some outputs, or of all, float32."""
        (only,) = self.members
        return F.pad(only.gathered(rows), (0, 0, 0, self.shape[0] - self.needed))

    def stage(self) -> None:
        """Be made ready by stages, because a linear layer multiplies by this."""
        self.staged = True

    def join(self) -> None:
        """Be the members' product, before any probe."""
        for member in self.members:
            member.product = self

    def take(self, member: LowRankMatrix) -> None:
        """Take a member's V of the window that opens."""
        for projector, _ in self._projectors.values():
            # In place, because a captured graph reads it from where it was.
            self._project(projector, member)

    def projector(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """What turns inputs into factors, ``(rows, in)``: V for every term; and ones for bias shifts, or None."""
        if dtype not in self._projectors:
            # Ordinary tensors, which may be written to whether or not the next window opens in inference mode.
            with torch.inference_mode(False):
                rows, _ = self.shape
                v = self.members[0].v
                projector = torch.zeros(rows, len(v), dtype=dtype, device=v.device)
                for member in self.members:
                    self._project(projector, member)
                self._projectors[dtype] = projector, self._unit(projector)
        return self._projectors[dtype]

    def _project(self, projector: Tensor, changed: LowRankMatrix) -> None:
        for member, rows, _ in self.parts():
            if member is changed:
                projector[rows][: self.terms * member.v.shape[1]].copy_(member.v.T.repeat(self.terms, 1))

    def _unit(self, projector: Tensor) -> Tensor | None:
        """What is added to the factors of any input: one for what a bias is shifted by; None without biases."""
        if all(member.bias is None for member in self.members):
            return None
        unit = projector.new_zeros(len(projector))
        for member, rows, _ in self.parts():
            if member.bias is not None:
                unit[rows][-self.terms :] = 1.0
        return unit


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, keep: float) -> Tensor:
    """``keep * x W^T + bias``."""
    if keep == 1.0:
        return F.linear(x, weight, bias)
    y = F.linear(x, weight).mul_(keep)
    return y if bias is None else y.add_(bias)
