"""How a weight moves at the end of a window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from zotune.layout import Site

Change = Callable[[slice], Tensor]
"""Gives the float32 change of a range of rows of a site."""


@dataclass(frozen=True)
class LowRankChange:
    """``left right^T``, multiplied out row by row as it is asked for.

    Attributes:
        left: float32 ``(out, r)``.
        right: float32 ``(in, r)``.
    """

    left: Tensor
    right: Tensor

    def __call__(self, rows: slice) -> Tensor:
        """See `Change`."""
        return self.left[rows] @ self.right.T


@dataclass(frozen=True)
class Move:
    """``weight <- keep * weight + change``.

    Attributes:
        site: Whose weight it is.
        weight: Of the site's shape, in the model's dtype.
        change: The float32 change of some rows.
        keep: What weight decay leaves of the weight.
    """

    site: Site
    weight: Tensor
    change: Change
    keep: float = 1.0
