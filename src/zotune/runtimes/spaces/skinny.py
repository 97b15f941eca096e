"""The skinny product: what a perturbation adds to an ordinary product, for matrices that take the same input.

Of one matrix it is ``P sum_j mix[k, j] Phi_j^T`` with ``P = x V`` (`zotune.runtimes.spaces.lowrank`). Matrices side by
side, whose outputs follow each other, have their V side by side too, and what P is multiplied by in blocks along a
diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zotune.runtimes.spaces.projection import Projection, plain

if TYPE_CHECKING:
    from zotune.runtimes.spaces.lowrank import LowRankMatrix

_ALIGNED = {"cuda": 8}
"""A GPU's products of 16-bit numbers are several times slower where an extent is no multiple of this."""


def filled(factors: int, device: torch.device) -> int:
    """So many factors, and what fills them up where a device multiplies faster with more."""
    step = _ALIGNED.get(device.type, 1)
    return -(-factors // step) * step


class SkinnyProduct(Projection):
    """The product of all blocks with matrices side by side, perturbation included.

    Args:
        members: The matrices, of the same width; weight decay leaves the same of each.

    Attributes:
        factors: ``(blocks, rows, out)`` in the products' dtype, once there was a probe: of every member B, then what a
            probe adds to it, which in 16 bits their sum would round away; two more rows, alike, if it carries a bias.
    """

    factors: Tensor

    def __init__(self, members: Sequence[LowRankMatrix]) -> None:
        super().__init__(members, terms=2)

    @property
    def rows(self) -> int:
        """Rows of ``factors``, with what fills them up for a GPU's products."""
        return filled(self.needed, self.members[0].update.device)

    @property
    def shape(self) -> tuple[int, int]:
        """Of a block's ``factors``."""
        return self.rows, sum(len(member.update) for member in self.members)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """See `Projection.linear`."""
        if not self.moves:
            return plain(x, weight, bias, self.keep)
        factors = self.factors if self.staged else self._gathered(rows).to(x.dtype)
        projected = self.factors_of(x)
        if bias is not None and x.is_cuda:
            # Rounded twice, because a GPU adds a bias as it writes a product, and else goes over y twice more.
            return plain(x, weight, bias, self.keep).baddbmm_(projected, factors)
        # The large product is added to the small one before it is rounded: the other way round would round twice.
        y = projected @ factors if bias is None else torch.baddbmm(bias, projected, factors)
        y.flatten(0, 1).addmm_(x.flatten(0, 1), weight.T, alpha=self.keep)
        return y

    def _gathered(self, rows: Tensor | None) -> Tensor:
        """What some outputs, or all, are made with, float32 ``(blocks, rows, out)``."""
        (only,) = self.members
        return F.pad(only.gathered(rows), (0, 0, 0, self.rows - self.needed))
