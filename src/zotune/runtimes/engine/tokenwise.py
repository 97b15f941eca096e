"""Low-rank perturbation, token by token: what the wrapped layers of an inference engine compute.

An engine decides where a token lies in a forward, pads the forward, and may capture it as a graph. So every token
carries its own mixture here, in one static buffer that all layers read: column 0 is the update accumulated in this
window, column j the j-th direction in flight. A linear layer computes

    y = x W^T + sum_j (mix[:, j] * x V) Phi_j^T,    Phi_0 = B,  Phi_j = eps U_j,  mix = 1 and -1, 0, +1

as one skinny product behind its own; see `zotune.runtimes.spaces.lowrank` for the mathematics. The bias of a layer is
one more row of every ``Phi_j^T``, whose x V is one. All buffers keep their place in memory, which is what a captured
graph needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zotune.layout import Site
from zotune.protocol import DirectionKey, Probe, Update
from zotune.runtimes.engine.scatter import Scatter
from zotune.runtimes.folding.fold import Fold
from zotune.runtimes.spaces.lowrank import LowRankMatrix, LowRankSpace
from zotune.runtimes.spaces.mixture import Lookup
from zotune.runtimes.spaces.skinny import filled

if TYPE_CHECKING:
    from zotune.runtimes.engine.bank import Bank


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
    """

    def __init__(self, tokens: int, directions: int, dtype: torch.dtype, device: torch.device) -> None:
        self.mixtures = torch.zeros(1 + 2 * directions, 1 + directions, device=device)
        self.mixtures[:, 0] = 1.0
        for column in range(1, 1 + directions):
            for sign in (1, -1):
                self.mixtures[self.number(column, sign), column] = sign
        self.which = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.exact = self.mixtures[self.which]
        self.dtype, self.device = dtype, device
        self._spread: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @staticmethod
    def number(column: int, sign: int) -> int:
        """Of the mixture of the update and ``sign`` times a column's direction; 0 is the update alone."""
        return 2 * column - (sign > 0) if sign else 0

    @property
    def columns(self) -> int:
        """Of every token's mixture."""
        return self.exact.shape[1]

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
        tokens = len(numbers)
        self.which[:tokens] = numbers
        for mixtures, shown in ((self.mixtures, self.exact), *self._spread.values()):
            shown[:tokens] = mixtures[numbers]

    def clear(self, tokens: int) -> None:
        """Make the first tokens clean again: the update alone."""
        self.show(torch.zeros_like(self.which[:tokens]))


class Columns:
    """Finished windows beside a matrix, of one site or several side by side; see `zotune.runtimes.engine.bank`.

    Args:
        parts: The sites.
        shape: ``(out, in)`` of the module's weight.
        budget: Columns of each site.
        like: Has the dtype, and is where the module is.
    """

    def __init__(self, parts: Sequence[Part], shape: tuple[int, int], budget: int, like: Tensor) -> None:
        self.parts, self.budget = tuple(parts), budget
        self.b, self.v = like.new_zeros(shape[0], budget), like.new_zeros(shape[1], budget * len(self.parts))

    def show(self, index: int, b: Tensor, v: Tensor) -> None:
        """Take a site's columns, ``(out, budget)`` and ``(in, budget)`` of the whole site."""
        part = self.parts[index]
        self.b[part.local], self.v[:, self._own(index)] = part.of(b), v[part.columns]

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Add ``x V B^T`` to ``y (tokens, out)``, in place; ``x`` is ``(tokens, in)``."""
        projected = x @ self.v
        for index, part in enumerate(self.parts):
            y[:, part.local].addmm_(projected[:, self._own(index)], self.b[part.local].T)
        return y

    def _own(self, index: int) -> slice:
        return slice(index * self.budget, (index + 1) * self.budget)


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


class TunedMatrix:
    """The linear weight of a module, and its bias: one site or several side by side, whole or a shard.

    Args:
        parts: Of the weight.
        shape: ``(out, in)`` of the weight.
        rank: Columns of a window's V.
        mix: What each token sees.
        biases: Parts of the module's bias.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        shape: tuple[int, int],
        rank: int,
        mix: TokenMix,
        biases: Sequence[Part] = (),
    ) -> None:
        self.parts, self.vectors, self.rank, self.mix = tuple(parts), tuple(biases), rank, mix
        self._width = rank * len(self.parts) + bool(biases)
        factors = filled(mix.columns * self._width, mix.device)
        # Once for every column: what is projected needs but one product with the tokens' mixtures then.
        self.v = torch.zeros(shape[1], factors, dtype=mix.dtype, device=mix.device)
        # Zero wherever a site's factors do not reach another site's rows.
        self.phi = torch.zeros(factors, shape[0], dtype=mix.dtype, device=mix.device)
        self.mixed = mix.spread(self._width, factors)
        self._ones: Tensor | None = None
        if biases:
            self._ones = torch.zeros_like(self.v[0])
            self._ones[[self._bias_row(column) for column in range(mix.columns)]] = 1.0
        self.keep = torch.ones((), dtype=mix.dtype, device=mix.device)
        self.decays = False
        self.bank: Columns | None = None

    def open_window(self, sites: Mapping[Site, LowRankMatrix]) -> None:
        """Take the window's V of every part."""
        for column in range(self.mix.columns):
            for part, own in self._own(column):
                self.v[:, own] = sites[part.site].v[part.columns]

    def show(self, column: int, factors: Mapping[Site, Tensor]) -> None:
        """Take one column's factors ``(out, r)`` of every part, and changes ``(out,)`` of every bias."""
        for part, own in self._own(column):
            self.phi[own, part.local] = part.of(factors[part.site]).T
        for part in self.vectors:
            self.phi[self._bias_row(column), part.local] = part.of(factors[part.site])

    def vector(self) -> Tensor:
        """What is shown of the update of the bias, ``(out,)``."""
        return self.phi[self._bias_row(0)]

    def add_to(self, y: Tensor, x: Tensor, biased: bool = False) -> Tensor:
        """Add every token's perturbation to ``y (tokens, out)``, in place.

        Args:
            y: Products and perhaps bias.
            x: ``(tokens, in)``.
            biased: Whether that of the bias belongs here, which is one shard's.
        """
        projected = torch.addmm(self._ones, x, self.v) if biased and self._ones is not None else x @ self.v
        y.addmm_(projected.mul_(self.mixed[: len(x)]), self.phi)
        return y if self.bank is None else self.bank.add_to(y, x)

    def open_bank(self, budget: int) -> None:
        """Make room for finished windows."""
        self.bank = Columns(self.parts, (self.phi.shape[1], len(self.v)), budget, self.v)

    def _own(self, column: int) -> list[tuple[Part, slice]]:
        starts = range(column * self._width, (column + 1) * self._width, self.rank)
        return [(part, slice(start, start + self.rank)) for part, start in zip(self.parts, starts, strict=False)]

    def _bias_row(self, column: int) -> int:
        return (column + 1) * self._width - 1


class TunedTable:
    """An embedding ``(rows, width)``, also as an output head; factors are float32."""

    def __init__(self, part: Part, rows: int, rank: int, mix: TokenMix) -> None:
        self.parts, self.rank, self.mix = (part,), rank, mix
        self.phi = torch.zeros(rows, mix.columns, rank, device=mix.exact.device)
        self.v = torch.zeros(part.site.shape[1], rank, device=mix.exact.device)
        self.keep = torch.ones((), device=mix.exact.device)
        self.decays = False
        self.bank: Columns | None = None

    def open_window(self, sites: Mapping[Site, LowRankMatrix]) -> None:
        """Take the window's V."""
        self.v.copy_(sites[self.parts[0].site].v)

    def show(self, column: int, factors: Mapping[Site, Tensor]) -> None:
        """Take one column's factors ``(rows, r)``."""
        (part,) = self.parts
        self.phi[part.local, column] = part.of(factors[part.site])

    def embed(self, lookup: Lookup, found: Tensor) -> Tensor:
        """Every token's own embedding ``(tokens, width)``, from what it ``found`` in the stored table."""
        factors = lookup(self.phi.flatten(1)).view(len(found), -1, self.rank)
        shift = torch.einsum("njr,nj->nr", factors, self.mix.exact[: len(found)]) @ self.v.T
        if self.bank is not None:
            shift.addmm_(lookup(self.bank.b), self.bank.v.T)
        return found.float().mul_(self.keep).add_(shift).to(found.dtype)

    def logits(self, hidden: Tensor, mix: Tensor, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        """Float32 logits ``(n, rows)``.

        Args:
            hidden: float32 ``(n, width)``.
            mix: The mixture of each, float32 ``(n, columns)``.
            weight: The stored rows that are asked for, float32.
            rows: Which they are; None for all.
        """
        phi = self.phi[: len(weight)] if rows is None else self.phi[rows]
        projected = (hidden @ self.v).unsqueeze(1) * mix.unsqueeze(2)
        y = (hidden @ weight.T).mul_(self.keep).addmm_(projected.flatten(1), phi.flatten(1).T)
        if self.bank is not None:
            y.addmm_(hidden @ self.bank.v, (self.bank.b[: len(weight)] if rows is None else self.bank.b[rows]).T)
        return y

    def learnt(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``(n, all rows)`` of what was learnt alone, without directions; ``hidden`` is float32."""
        y = (hidden @ self.v) @ self.phi[:, 0].T
        return y if self.bank is None else self.bank.add_to(y, hidden)

    def open_bank(self, budget: int) -> None:
        """Make room for finished windows."""
        self.bank = Columns(self.parts, (len(self.phi), len(self.v)), budget, self.v)


Tuned = TunedVector | TunedMatrix | TunedTable


class TokenSpace(LowRankSpace):
    """A low-rank space whose factors are copied into the static buffers of an engine's modules."""

    def attach(self, modules: Sequence[Tuned], mix: TokenMix) -> None:
        """Let these modules follow all that moves here from now on."""
        self.modules, self.mix = tuple(modules), mix
        self._scatter = Scatter(self.modules, tuple(self.sites), self.directions.factors)
        self.bank: Bank | None = None
        for module in modules:
            module.decays = bool(self.method.weight_decay) and module.parts[0].site.decays
        self._refresh_window()

    def column_of(self, probes: Sequence[Probe]) -> dict[tuple[DirectionKey, float], int]:
        """The column of every direction of these probes."""
        moved = dict.fromkeys((probe.key, probe.eps) for probe in probes if probe.key is not None)
        return {direction: column for column, direction in enumerate(moved, start=1)}

    def probe(self, probes: Sequence[Probe]) -> None:
        """Make the modules hold the directions of these probes; `TokenMix` says which token sees which.

        Raises:
            ValueError: A probe is not of the current window, or there are more directions than columns.
        """
        columns = self.column_of(probes)
        if len(columns) >= self.mix.columns:
            raise ValueError(f"got {len(columns)} directions at once, room is for {self.mix.columns - 1}")
        for (key, eps), column in columns.items():
            self._scatter.show(column, self._draw(key) * eps)

    def shift(self, probe: Probe) -> dict[Site, Tensor]:
        """What a probe adds to every site's update: ``sign * eps * U``, float32 ``(out, r)``.

        Raises:
            ValueError: The probe is not of the current window.
        """
        flat = torch.zeros_like(self.factors) if probe.key is None else self._draw(probe.key) * (probe.sign * probe.eps)
        return dict(zip(self.sites, self.directions.factors.views(flat), strict=True))

    def numbers(self, probes: Sequence[Probe]) -> Tensor:
        """The number of the mixture of each probe's tokens, int64 ``(probes,)``; see `TokenMix.number`."""
        columns = self.column_of(probes)
        found = [0 if p.key is None else self.mix.number(columns[p.key, p.eps], p.sign) for p in probes]
        return torch.tensor(found, device=self.device)

    def apply(self, update: Update, weights: Mapping[Site, Tensor], fold: Fold) -> None:
        """As `LowRankSpace.apply`; the modules show the new update at once."""
        super().apply(update, weights, fold)
        if update.closes_window:
            self._refresh_window()
        else:
            self._refresh_update()

    def load_state(self, state: dict[str, Tensor], window: int) -> None:
        """As `LowRankSpace.load_state`."""
        super().load_state(state, window)
        self._refresh_window()

    def _refresh_window(self) -> None:
        matrices = {site: state for site, state in self.sites.items() if isinstance(state, LowRankMatrix)}
        for module in self.modules:
            if not isinstance(module, TunedVector):
                module.open_window(matrices)
        self._refresh_update()

    def _refresh_update(self) -> None:
        for module in self.modules:
            if module.decays:
                module.keep.fill_(self.sites[module.parts[0].site].keep)
        self._scatter.show(0, self.factors)
        if self.bank is not None:
            self.bank.show(self.modules)
