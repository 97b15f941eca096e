"""Low-rank perturbation, token by token: what the wrapped layers of an inference engine compute.

Every token has a mixture of its own (`zotune.runtimes.engine.tokens`): column 0 is the update accumulated in this
window, column j the j-th direction in flight. A linear layer computes

    y = x W^T + sum_j (mix[:, j] * x V) Phi_j^T,    Phi_0 = B,  Phi_j = eps U_j,  mix = 1 and -1, 0, +1

as one skinny product behind its own; see `zotune.runtimes.spaces.lowrank` for the mathematics. The bias of a layer is
one more row of every ``Phi_j^T``, whose x V is one. All buffers keep their place in memory, which is what a captured
graph needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from zotune.layout import Site
from zotune.optimizer import Method
from zotune.protocol import Probe, Update
from zotune.runtimes.engine.scatter import Scatter
from zotune.runtimes.engine.tokens import Part, TokenMix, TunedVector
from zotune.runtimes.folding.fold import Fold
from zotune.runtimes.spaces.lowrank import LowRankMatrix, LowRankSpace
from zotune.runtimes.spaces.mixture import Lookup
from zotune.runtimes.spaces.skinny import filled


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


class Finished(Protocol):
    """Finished windows that modules see beside the current one; see `zotune.runtimes.engine.bank`."""

    def show(self, modules: Sequence[Tuned]) -> None:
        """Copy them into their buffers."""
        ...


class TokenSpace(LowRankSpace):
    """A low-rank space whose factors are copied into the static buffers of an engine's modules.

    Args:
        sites: Of the layout, in order.
        method: What to tune, and how directions look.
        seed: The run's seed.
        mix: What each token sees.
    """

    def __init__(self, sites: Sequence[Site], method: Method, seed: int, mix: TokenMix) -> None:
        super().__init__(sites, method, seed, mix.device)
        self.mix = mix

    def matrix(self, parts: Sequence[Part], shape: tuple[int, int], biases: Sequence[Part] = ()) -> TunedMatrix:
        """What tunes the linear weight of a module, and its bias; see `TunedMatrix`."""
        return TunedMatrix(parts, shape, self.method.rank, self.mix, biases)

    def table(self, part: Part, rows: int) -> TunedTable:
        """What tunes an embedding of so many rows."""
        return TunedTable(part, rows, self.method.rank, self.mix)

    def attach(self, modules: Sequence[Tuned]) -> None:
        """Let these modules follow all that moves here from now on."""
        self.modules = tuple(modules)
        self._scatter = Scatter(self.modules, tuple(self.sites), self.directions.factors)
        self.bank: Finished | None = None
        for module in modules:
            module.decays = bool(self.method.weight_decay) and module.parts[0].site.decays
        self._refresh_window()

    def probe(self, probes: Sequence[Probe]) -> None:
        """Make the modules hold the directions of these probes; `TokenMix` says which token sees which.

        Raises:
            ValueError: A probe is not of the current window, or there are more directions than columns.
        """
        for (key, eps), column in self.mix.column_of(probes).items():
            self._scatter.show(column, self._draw(key) * eps)

    def shift(self, probe: Probe) -> dict[Site, Tensor]:
        """What a probe adds to every site's update: ``sign * eps * U``, float32 ``(out, r)``.

        Raises:
            ValueError: The probe is not of the current window.
        """
        flat = torch.zeros_like(self.factors) if probe.key is None else self._draw(probe.key) * (probe.sign * probe.eps)
        return dict(zip(self.sites, self.directions.factors.views(flat), strict=True))

    def goes_into_weights(self, update: Update) -> bool:
        """Whether weights change by this update: at the end of a window."""
        return update.closes_window

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
