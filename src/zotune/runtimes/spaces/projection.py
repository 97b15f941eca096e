"""What turns the inputs of linear layers into factors: the V of all matrices that are one product, side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from zotune.runtimes.spaces.lowrank import LowRankMatrix


class Projection(ABC):
    """The factors of matrices side by side; `SkinnyProduct` and `AppendedProduct` say what they are multiplied by.

    A member's factors are V for every term of its perturbation, one behind the other, and after them as many ones if
    it carries the bias of its layer.

    Args:
        members: The matrices, of the same width; weight decay leaves the same of each.
        terms: Of each member's perturbation, B being the first.

    Attributes:
        staged: Whether a stage makes ready what the factors are multiplied by; a head, which is asked for some outputs,
            gathers that itself.
    """

    def __init__(self, members: Sequence[LowRankMatrix], terms: int) -> None:
        self.members, self.terms, self.staged = tuple(members), terms, False
        self._projectors: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    @property
    def needed(self) -> int:
        """Factors of all members together."""
        return self.terms * sum(member.width for member in self.members)

    @property
    @abstractmethod
    def rows(self) -> int:
        """The same with what fills them up."""

    @property
    def moves(self) -> bool:
        """Whether there is a perturbation in this window."""
        return any(member.moves for member in self.members)

    @property
    def keep(self) -> float:
        """What weight decay has left of the weights in this window."""
        return self.members[0].keep

    def parts(self) -> Iterator[tuple[LowRankMatrix, slice, slice]]:
        """Every member with its own factors and its own outputs."""
        row, output = 0, 0
        for member in self.members:
            rows = slice(row, row + self.terms * member.width)
            outputs = slice(output, output + len(member.update))
            yield member, rows, outputs
            row, output = rows.stop, outputs.stop

    def factors_of(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., rows)``, in the dtype of x."""
        return F.linear(x, *self.projector(x.dtype))

    def projector(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """V for every term, ``(rows, in)``; and ``(rows,)`` with ones for biases, or None where there are none."""
        if dtype not in self._projectors:
            # Ordinary tensors, which may be written to whether or not the next window opens in inference mode.
            with torch.inference_mode(False):
                v = self.members[0].v
                projector = torch.zeros(self.rows, len(v), dtype=dtype, device=v.device)
                for member in self.members:
                    self._project(projector, member)
                self._projectors[dtype] = projector, self._unit(projector)
        return self._projectors[dtype]

    def take(self, member: LowRankMatrix) -> None:
        """Take a member's V of the window that opens."""
        for projector, _ in self._projectors.values():
            # In place, because a captured graph reads it from where it was.
            self._project(projector, member)

    def join(self) -> None:
        """Be the members' product, before any probe."""
        for member in self.members:
            member.product = self

    def stage(self) -> None:
        """Be made ready by stages, because a linear layer multiplies by this."""
        self.staged = True

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """``x_k W_k^T + bias`` of every block.

        Args:
            x: ``(blocks, tokens, in)``.
            weight: ``(out, in)``, or only the ``rows`` of it; in the dtype of x.
            bias: ``(out,)`` or None.
            rows: Output rows that ``weight`` holds, of a matrix that has no neighbours; None for all.
        """

    def _project(self, projector: Tensor, changed: LowRankMatrix) -> None:
        for member, rows, _ in self.parts():
            if member is changed:
                projector[rows][: self.terms * member.v.shape[1]].copy_(member.v.T.repeat(self.terms, 1))

    def _unit(self, projector: Tensor) -> Tensor | None:
        if all(member.bias is None for member in self.members):
            return None
        unit = projector.new_zeros(len(projector))
        for member, rows, _ in self.parts():
            if member.bias is not None:
                unit[rows][-self.terms :] = 1.0
        return unit


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, keep: float) -> Tensor:
    """``keep * x W^T + bias``, rounded once."""
    if keep == 1.0:
        return F.linear(x, weight, bias)
    first = x.new_zeros(len(weight)) if bias is None else bias
    return torch.addmm(first, x.flatten(0, 1), weight.T, alpha=keep).view(*x.shape[:-1], -1)
