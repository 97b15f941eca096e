"""Factors as further inputs of a layer, so that its output is written once.

With ``P = x V``, and a weight that is stored with room for factors beside it, what `zotune.runtimes.spaces.lowrank`
says of a linear layer is one product:

    y_k = [x, mix[k, 0] P, ..., mix[k, q] P] [W, Phi_0, ..., Phi_q]^T

A processor with 16-bit products computes them faster than it writes and reads outputs, so this is what it takes; with
others, and where inputs are more than outputs, `zotune.runtimes.spaces.skinny` is as fast and needs no room.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zotune.noise import NoiseBlock
from zotune.optimizer import Method
from zotune.runtimes.precision import product_dtype
from zotune.runtimes.spaces.mixture import Mixture, Vector
from zotune.runtimes.spaces.projection import Projection, plain

if TYPE_CHECKING:
    from zotune.runtimes.spaces.lowrank import LowRankMatrix

_STEP = 32
"""Room is a multiple of so many columns, as processors' tiles and cache lines are."""

_SHARE = 4
"""Room is at most the inputs over this. What is to be computed grows as much, and is still faster."""

_LITTLE = 0.5
"""Where weight decay has left less of a weight, factors are not divided by that: by next to nothing they overflow."""

_INTEGERS = {4: torch.int32, 8: torch.int64}
"""By their bytes."""


class AppendedProduct(Projection):
    """The product of all blocks with matrices whose factors are stored beside their weights.

    Args:
        members: The matrices, of the same width, one below the other; weight decay leaves the same of each.
        stored: ``(out, in + room)``: their weights, and room that is zero.
        directions: Most that the blocks of a pack may see.

    Attributes:
        amounts: How much of its own columns each block takes, ``(blocks, 1, room)``, once there was a probe; -1, 0 and
            1, which are exact in any dtype, where probes of a direction are equally far.
    """

    amounts: Tensor

    def __init__(self, members: Sequence[LowRankMatrix], stored: Tensor, directions: int) -> None:
        super().__init__(members, terms=1 + directions)
        self._stored = stored
        self._inputs = len(self.members[0].v)

    @property
    def rows(self) -> int:
        """Factors that there is room for."""
        return self._stored.shape[1] - self._inputs

    @property
    def term_of(self) -> tuple[int, ...]:
        """The term of each column of the room; one more than there are where a column is none's."""
        used: list[int] = []
        for member in self.members:
            used += [term for term in range(self.terms) for _ in range(member.update.shape[1])]
            used += range(self.terms) if member.bias is not None else ()
        return (*used, *[self.terms] * (self.rows - len(used)))

    def beside(self) -> Iterator[tuple[LowRankMatrix, Tensor]]:
        """Every member, and where its factors go, ``(out, terms * width)``."""
        for member, columns, outputs in self.parts():
            yield member, self._stored[outputs, self._inputs :][:, columns]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """See `Projection.linear`; ``rows`` are all."""
        assert rows is None, "only a head is asked for some rows, and it is not stored like this"
        if not self.moves:
            return plain(x, weight, bias, self.keep)
        projected = self.factors_of(x).mul_(self.amounts)
        if abs(self.keep) < _LITTLE:
            # Two products, the large one added before it is rounded, as in `SkinnyProduct`.
            y = F.linear(projected, self._stored[:, self._inputs :], bias)
            y.flatten(0, 1).addmm_(x.flatten(0, 1), weight.T, alpha=self.keep)
            return y
        if self.keep != 1.0:
            projected.div_(self.keep)
        return plain(torch.cat([x, projected], -1), self._stored, bias, self.keep)


class Beside:
    """What the blocks of a pack see beside all weights that have room; a part of a `stage.Stage`.

    Args:
        products: That find their factors there.
        states: Of all sites, in order.
        layout: Of flat buffers.
        mix: Of the blocks.
        dtype: Of the weights.
    """

    def __init__(
        self,
        products: Sequence[AppendedProduct],
        states: Sequence[LowRankMatrix | Vector],
        layout: NoiseBlock,
        mix: Mixture,
        dtype: torch.dtype,
    ) -> None:
        self._products, self._mix = products, mix
        self._amounts: dict[tuple[int, ...], Tensor] = {}
        self._scales = torch.ones(mix.weights.shape[1], 1)
        self._terms = torch.zeros(mix.weights.shape[1] if products else 0, layout.size, dtype=dtype)
        self._joined, self._placed = _Copies(), _Copies()
        flat = [dict(zip(states, layout.views(term), strict=True)) for term in self._terms]
        for member, place in chain.from_iterable(product.beside() for product in products):
            # All terms side by side first, for a weight's rows are far apart, and each is to be gone to once.
            rows, rank = place.new_zeros(place.shape), member.update.shape[1]
            terms = place.shape[1] // member.width
            self._placed.add(place, rows)
            for term, seen in enumerate(flat):
                self._joined.add(rows[:, term * rank : (term + 1) * rank], seen[member])
                if member.bias is not None:
                    self._joined.add(rows[:, rank * terms + term], seen[member.bias])

    def enter(self) -> None:
        """Let every product take what these blocks take."""
        for product in self._products:
            terms = product.term_of
            if terms not in self._amounts:
                self._amounts[terms] = self._amounts_of(terms)
            product.amounts = self._amounts[terms]

    def mix(self) -> None:
        """Take the numbers of another mixture."""
        self._scales = self._mix.weights.abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
        for terms, amounts in self._amounts.items():
            amounts.copy_(self._amounts_of(terms))

    def show(self, update: Tensor, directions: Tensor) -> None:
        """Write B and the directions beside the weights; see `zotune.runtimes.spaces.stage.Stage.show`."""
        if len(self._terms):
            self._terms[0].copy_(update)
            torch.mul(directions[: len(self._terms) - 1], self._scales[1:], out=self._terms[1:])
            self._joined.copy()
            self._placed.copy()

    def _amounts_of(self, terms: tuple[int, ...]) -> Tensor:
        """See `AppendedProduct.amounts`, from the term of each column: nothing of one that is not there."""
        signs = self._mix.weights / self._scales.view(-1)
        return F.pad(signs, (0, max(terms) + 1 - signs.shape[1]))[:, list(terms)].unsqueeze(1).to(self._terms.dtype)


class _Copies:
    """Hundreds of copies, each shorter than a call takes, as one call."""

    def __init__(self) -> None:
        self._to: list[Tensor] = []
        self._from: list[Tensor] = []

    def add(self, to: Tensor, given: Tensor) -> None:
        """Copy this, too; a row as one integer where there is one of its size, for PyTorch goes number by number."""
        size = to.shape[-1] * to.element_size()
        starts = [each for tensor in (to, given) for each in (tensor.storage_offset(), *tensor.stride()[:-1])]
        if to.dim() == 2 and size in _INTEGERS and not any(start * to.element_size() % size for start in starts):
            to, given = (tensor.view(_INTEGERS[size]) for tensor in (to, given))
        self._to.append(to)
        self._from.append(given)

    def copy(self) -> None:
        """Do all of them."""
        torch._foreach_copy_(self._to, self._from)


def room(layers: Sequence[nn.Linear], names: Sequence[str], tuned: Collection[str], method: Method) -> int:
    """How many columns to store beside the weights of layers that take the same input; 0 for none.

    Args:
        layers: Of one dtype and device.
        names: Of the layers, in the model.
        tuned: Names of the parameters that are tuned.
        method: How directions look, and how many a step has.
    """
    first = layers[0]
    if not pays(first.weight.dtype, first.weight.device.type) or f"{names[0]}.weight" not in tuned:
        return 0
    inputs, outputs = first.in_features, sum(layer.out_features for layer in layers)
    biases = sum(f"{name}.bias" in tuned for name in names)
    needed = (1 + method.directions) * (len(layers) * method.rank + biases)
    columns = -(-needed // _STEP) * _STEP
    return columns if inputs <= outputs and _SHARE * columns <= inputs else 0


def pays(dtype: torch.dtype, device: str) -> bool:
    """Whether a device's products of this dtype are so fast that writing their outputs once more counts."""
    return device == "cpu" and dtype != torch.float32 and product_dtype(dtype, device) == dtype
