"""Dense perturbation, token by token: MeZO's directions in the wrapped layers of an inference engine.

Token n sees ``W + mix[n, j] eps_j z_j``. What a direction adds is a product of its own behind the layer's,

    y_n = W x_n + sum_j mix[n, j] eps_j z_j x_n        mix = -1, 0 or +1

so the stored weight is not touched, whatever form the engine keeps it in, and nothing has to be restored. One part of
one direction exists at a time: it is drawn whenever a layer is called, and so in no captured graph. Updates go into the
weights with every step (`zotune.runtimes.spaces.dense`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zotune.directions import DenseDirections
from zotune.layout import Site
from zotune.optimizer import Method
from zotune.protocol import DirectionKey, Probe, Update
from zotune.runtimes.engine import shards
from zotune.runtimes.engine.tokens import Part, TokenMix, TunedVector
from zotune.runtimes.spaces.dense import DenseSpace
from zotune.runtimes.spaces.mixture import Lookup


@dataclass(frozen=True)
class Moved:
    """A direction in flight.

    Attributes:
        key: Of the direction.
        eps: How far it moves the weights.
        directions: What it is drawn by.
    """

    key: DirectionKey
    eps: float
    directions: DenseDirections

    def at(self, part: Part) -> Tensor | None:
        """The unit direction at a part of a site, float32 of the part's shape; None where it is not its turn."""
        if not part.site.moves(self.key.window):
            return None
        return shards.take(self.directions.draw(self.key, part.site), part.rows, part.columns)


class DrawnMatrix:
    """The linear weight of a module, and its bias; see `zotune.runtimes.engine.tokenwise.TunedMatrix`.

    Attributes:
        moved: The directions in flight, column by column.
        keep: What weight decay has left of the weight since its last fold: all, for every step is a fold.
        decays: Whether it acts in between.
    """

    keep, decays = torch.ones(()), False

    def __init__(self, parts: Sequence[Part], mix: TokenMix, biases: Sequence[Part] = (), out: int = 0) -> None:
        self.parts, self.vectors, self.mix = tuple(parts), tuple(biases), mix
        self.moved: Sequence[Moved] = ()
        self._bias = TunedVector(biases, out, mix) if biases else None

    def show(self, column: int, factors: Mapping[Site, Tensor]) -> None:
        """Take one column's changes ``(out,)`` of every bias."""
        if self._bias is not None:
            self._bias.show(column, factors)

    def add_to(self, y: Tensor, x: Tensor, biased: bool = False) -> Tensor:
        """Add every token's perturbation to ``y (tokens, out)``, in place; see `TunedMatrix.add_to`."""
        if self.mix.clean:
            return y
        for column, moved in enumerate(self.moved, start=1):
            signed = x * self.mix.exact[: len(x), column].to(x.dtype).unsqueeze(1)
            for part in self.parts:
                if (z := moved.at(part)) is not None:
                    y[:, part.local].addmm_(signed, z.to(x.dtype).T, alpha=moved.eps)
        if biased and self._bias is not None:
            y.add_(self._bias.seen(torch.zeros_like(self._bias.phi[0]), len(x)))
        return y


class DrawnPair:
    """LoRA matrices A ``(r, in)`` and B ``(out, r)`` beside some outputs of a module.

    Args:
        where: The outputs.
        scale: Factor of what they add.
        stored: A and B.
        parts: Of their sites.
        mix: What each token sees.

    Attributes:
        tuned: What moves A, and B.
    """

    def __init__(self, where: slice, scale: float, stored: Sequence[Tensor], parts: Sequence[Part], mix: TokenMix):
        self._where, self._scale, (self._down, self._up) = where, scale, stored
        self.tuned = [DrawnMatrix([part], mix) for part in parts]

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add ``scale * B_n A_n x`` of every token n to ``y (tokens, out)``, in place; ``x`` is ``(tokens, in)``."""
        down, up = self.tuned
        inner = down.add_to(x @ self._down.T, x).mul_(self._scale)
        up.add_to(y[:, self._where].addmm_(inner, self._up.T), inner)


class DrawnTable:
    """An embedding ``(rows, width)``, also as an output head; see `zotune.runtimes.engine.tokenwise.TunedTable`."""

    keep, decays = torch.ones(()), False

    def __init__(self, part: Part, rows: int, mix: TokenMix) -> None:
        self.parts, self.vectors, self.mix = (part,), (), mix
        self.moved: Sequence[Moved] = ()
        self._rows = rows

    def show(self, column: int, factors: Mapping[Site, Tensor]) -> None:
        """Nothing: there is no vector."""

    def embed(self, lookup: Lookup, found: Tensor) -> Tensor:
        """Every token's own embedding ``(tokens, width)``, from what it ``found`` in the stored table."""
        if self.mix.clean:
            return found
        y = found.float()
        for column, moved in enumerate(self.moved, start=1):
            if (z := self._local(moved)) is not None:
                y = y.addcmul(lookup(z), self.mix.exact[: len(found), column].unsqueeze(1), value=moved.eps)
        return y.to(found.dtype)

    def logits(self, hidden: Tensor, mix: Tensor, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        """Float32 logits ``(n, rows)``; arguments as in `TunedTable.logits`."""
        y = hidden @ weight.T
        for column, moved in enumerate(self.moved, start=1):
            if (z := self._local(moved)) is not None:
                asked = z[: len(weight)] if rows is None else z[rows]
                y.addmm_(hidden * mix[:, column].unsqueeze(1), asked.T, alpha=moved.eps)
        return y

    def learnt(self, hidden: Tensor) -> Tensor:
        """Float32 logits of what was learnt and is not in the weights: none."""
        return hidden.new_zeros(())

    def _local(self, moved: Moved) -> Tensor | None:
        """A direction's rows that are here, and zeros where the table is filled up; None where it is not its turn."""
        (part,) = self.parts
        z = moved.at(part)
        return z if z is None or len(z) == self._rows else F.pad(z, (0, 0, 0, self._rows - len(z)))


Drawn = DrawnMatrix | DrawnTable | TunedVector


class DrawnSpace(DenseSpace):
    """A dense space whose directions an engine's modules draw; arguments as of `TokenSpace`."""

    def __init__(self, sites: Sequence[Site], method: Method, seed: int, mix: TokenMix) -> None:
        super().__init__(sites, method, seed, mix.device)
        self.mix = mix

    def matrix(self, parts: Sequence[Part], shape: tuple[int, int], biases: Sequence[Part] = ()) -> DrawnMatrix:
        """What tunes the linear weight of a module, and its bias."""
        return DrawnMatrix(parts, self.mix, biases, shape[0])

    def table(self, part: Part, rows: int) -> DrawnTable:
        """What tunes an embedding of so many rows."""
        return DrawnTable(part, rows, self.mix)

    def attach(self, modules: Sequence[Drawn]) -> None:
        """Let these modules follow all that moves here from now on."""
        self.modules = tuple(modules)

    def probe(self, probes: Sequence[Probe]) -> None:
        """Make the modules draw the directions of these probes; `TokenMix` says which token sees which.

        Raises:
            ValueError: A probe is not of the current step, or there are more directions than columns.
        """
        moved = [Moved(key, eps, self.directions) for key, eps in self.mix.column_of(probes)]
        for each in moved:
            self._require(each.key)
        for module in self.modules:
            for column, each in enumerate(moved, start=1):
                shown = {part.site: self.directions.draw(each.key, part.site) * each.eps for part in module.vectors}
                module.show(column, shown)
            if not isinstance(module, TunedVector):
                module.moved = moved

    def goes_into_weights(self, update: Update) -> bool:
        """Whether weights change by this update: by every one that is not of a skipped step."""
        return bool(update.terms)
