"""Low-rank perturbation: the heart of zotune.

A pack has K blocks of T tokens, one per probe (`zotune.runtimes.packing`). With ``Phi_0 = B``, the update accumulated
in this window, and ``Phi_j = U_j``, the directions of this step, block k sees the weights

    W_k = keep * W + sum_j mix[k, j] * Phi_j V^T        mix[k, 0] = 1,  mix[k, j] = sign_k * eps

so a linear layer is one ordinary product for all blocks and a skinny one per block:

    y = x W^T,    P = x V,    y_k += P_k sum_j mix[k, j] Phi_j^T

Nothing is copied per probe but ``(r, out)`` factors. Embeddings look the factors up, a tied head multiplies by them,
vectors (biases, norm gains) see ``b + sum_j mix[k, j] phi_j``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zotune.directions import LowRankDirections
from zotune.layout import Site
from zotune.optimizer import Method
from zotune.protocol import DirectionKey, Probe, Update
from zotune.runtimes.folding import Fold
from zotune.runtimes.mixture import Lookup, Mixture, Vector
from zotune.updates import Momentum, Rule, Sgd, combine


class LowRankMatrix:
    """A linear or embedding weight ``(out, in)`` as every block sees it.

    Attributes:
        update: B, float32 ``(out, r)``, a view of the space's flat buffer.
        keep: What weight decay has left of the weight in this window.
        moves: Whether it is the site's turn in this window; B and all directions are zero otherwise.
    """

    def __init__(self, update: Tensor) -> None:
        self.update = update
        self.keep, self.moves = 1.0, True

    def open_window(self, v: Tensor) -> None:
        """Take the window's V, float32 ``(in, r)``."""
        self.v = v
        self._projectors = {torch.float32: v.T.repeat(2, 1)}

    def probe(self, directions: list[Tensor], shift: Tensor, mix: Mixture) -> None:
        """Take this step's U, float32 ``(out, r)`` each, and what of them each block has, ``(blocks, out, r)``."""
        self._directions, self._mix = directions, mix
        if not self.moves:
            return
        # B and the shift stay apart, because in 16 bits their sum would round the smaller one away.
        self._factors = torch.cat([self.update.expand_as(shift), shift], 2).mT.contiguous()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """``x_k W_k^T + bias`` of every block.

        Args:
            x: ``(blocks, tokens, in)``.
            weight: ``(out, in)``, or only the ``rows`` of it; in the dtype of x.
            bias: ``(out,)`` or None.
            rows: Output rows that ``weight`` holds; None for all.
        """
        if self.keep == 1.0:
            y = F.linear(x, weight, bias)
        else:
            y = F.linear(x, weight).mul_(self.keep)
            y = y if bias is None else y.add_(bias)
        if not self.moves:
            return y
        factors = self._factors if rows is None else self._factors[:, :, rows]
        if x.dtype not in self._projectors:
            self._projectors[x.dtype] = self._projectors[torch.float32].to(x.dtype)
        return y.baddbmm_(F.linear(x, self._projectors[x.dtype]), factors.to(x.dtype))

    def embed(self, lookup: Lookup, weight: Tensor) -> Tensor:
        """``W_k[token]`` of every block, ``(blocks, tokens, in)``, in the dtype of ``weight``."""
        blocks, columns = self._mix.weights.shape
        found = lookup(torch.cat([self.update, *self._directions], 1))
        found = found.view(blocks, -1, columns, self.update.shape[1])
        shift = torch.einsum("ktjr,kj->ktr", found, self._mix.weights) @ self.v.T
        return lookup(weight).view(shift.shape).float().mul_(self.keep).add_(shift).to(weight.dtype)

    def change(self, rows: slice) -> Tensor:
        """The accumulated update ``B V^T`` of some rows, float32."""
        return self.update[rows] @ self.v.T


class LowRankSpace:
    """Directions, accumulated update and update rule of all sites: all that moves during a window."""

    def __init__(self, sites: Sequence[Site], method: Method, seed: int, device: torch.device) -> None:
        self.method, self.device = method, device
        self.directions = LowRankDirections(
            sites,
            seed=seed,
            rank=method.rank,
            scale=method.scale,
            distribution=method.distribution,
            device=device,
        )
        self.factors = torch.zeros(self.directions.factors.size, device=device)
        self.rule: Rule = Momentum(method.momentum, len(self.factors), device) if method.momentum else Sgd()
        views = zip(sites, self.directions.factors.views(self.factors), strict=True)
        self.sites = {site: LowRankMatrix(view) if site.is_matrix else Vector(view) for site, view in views}
        self._drawn: dict[DirectionKey, Tensor] = {}
        self.open_window(0)

    def open_window(self, index: int) -> None:
        """Draw V and start from no update."""
        self.window = index
        self.factors.zero_()
        for (site, state), v in zip(self.sites.items(), self.directions.window(index), strict=True):
            state.keep, state.moves = 1.0, site.moves(index)
            if isinstance(state, LowRankMatrix) and v is not None:
                state.open_window(v)

    def probe(self, probes: Sequence[Probe]) -> None:
        """Make every site show the blocks of these probes.

        Raises:
            ValueError: A probe is not of the current window.
        """
        keys = list(dict.fromkeys(probe.key for probe in probes if probe.key is not None))
        mix = Mixture.of(probes, keys, self.device)
        drawn = [self._draw(key) for key in keys]
        shift = torch.stack(drawn or [torch.zeros_like(self.factors)])[mix.picked].mul_(mix.amounts)
        views = [self.directions.factors.views(flat) for flat in (*drawn, shift)]
        for state, (*directions, shifts) in zip(self.sites.values(), zip(*views, strict=True), strict=True):
            if isinstance(state, Vector):
                state.probe(directions, mix)
            else:
                state.probe(directions, shifts, mix)

    def apply(self, update: Update, weights: Mapping[Site, Tensor], fold: Fold) -> None:
        """Move B by the update; at the end of a window fold it into the weights and open the next window."""
        if update.terms:
            self._decay(1 - update.lr * self.method.weight_decay)
            gradient = combine([(self._draw(key), coefficient) for key, coefficient in update.terms])
            self.rule.step(self.factors, gradient, update.lr)
        self._drawn.clear()
        if update.closes_window:
            for site, state in self.sites.items():
                fold.add(site, weights[site], state.change, state.keep, update.step)
            self.rule.turn(self.directions, self.window)
            self.open_window(self.window + 1)

    def state(self) -> dict[str, Tensor]:
        """B, what decay has left, and the rule's state."""
        keeps = torch.tensor([state.keep for state in self.sites.values()], dtype=torch.float64)
        return {"factors": self.factors, "keep": keeps, **self.rule.state()}

    def load_state(self, state: dict[str, Tensor], window: int) -> None:
        """Restore what `state` gave in this window."""
        self.open_window(window)
        self.factors.copy_(state["factors"])
        self.rule.load_state(state)
        for site_state, keep in zip(self.sites.values(), state["keep"].tolist(), strict=True):
            site_state.keep = keep

    def _draw(self, key: DirectionKey) -> Tensor:
        if key.window != self.window:
            raise ValueError(f"got a direction of window {key.window}, but the current window is {self.window}")
        if key not in self._drawn:
            self._drawn[key] = self.directions.draw(key)
        return self._drawn[key]

    def _decay(self, keep: float) -> None:
        if keep == 1.0:
            return
        for site, state in self.sites.items():
            if site.decays:
                state.update.mul_(keep)
                state.keep *= keep
