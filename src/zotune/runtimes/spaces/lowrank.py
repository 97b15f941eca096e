"""Low-rank perturbation: the heart of zotune.

A pack has K blocks of T tokens, one per probe (`zotune.runtimes.packing`). With ``Phi_0 = B``, the update accumulated
in this window, and ``Phi_j = U_j``, the directions of this step, block k sees the weights

    W_k = keep * W + sum_j mix[k, j] * Phi_j V^T        mix[k, 0] = 1,  mix[k, j] = sign_k * eps

so a linear layer is one ordinary product for all blocks and a skinny one per block:

    y = x W^T,    P = x V,    y_k += P_k sum_j mix[k, j] Phi_j^T

Nothing is copied per probe but ``(r, out)`` factors. Embeddings look the factors up, a tied head multiplies by them,
vectors (norm gains, biases) see ``b + sum_j mix[k, j] phi_j``; the bias of a linear layer is one more factor, whose P
is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zotune.directions import LowRankDirections
from zotune.layout import Site
from zotune.optimizer import Method
from zotune.protocol import DirectionKey, Probe, Update
from zotune.runtimes.folding.fold import Fold
from zotune.runtimes.folding.move import LowRankChange, Move
from zotune.runtimes.spaces.mixture import Lookup, Vector
from zotune.runtimes.spaces.projection import Projection
from zotune.runtimes.spaces.skinny import SkinnyProduct
from zotune.runtimes.spaces.stage import MatrixView, Stage
from zotune.updates import Momentum, Rule, Sgd, combine, in_float32


class LowRankMatrix:
    """A linear or embedding weight ``(out, in)`` as every block sees it.

    Attributes:
        update: B, float32 ``(out, r)``, a view of the space's flat buffer.
        keep: What weight decay has left of the weight in this window.
        moves: Whether it is the site's turn in this window; B and all directions are zero otherwise.
        v: V of the window, float32 ``(in, r)``.
        bias: The layer's bias, where the skinny product adds what it is shifted by.
        product: Its product, which it may share with neighbours.
        shown: What the blocks see in this step, once there was a probe.
    """

    v: Tensor
    product: Projection
    shown: MatrixView

    def __init__(self, update: Tensor) -> None:
        self.update = update
        self.keep, self.moves = 1.0, True
        self.bias: Vector | None = None
        self.product = SkinnyProduct([self])

    def carry(self, bias: Vector) -> bool:
        """Take over the shift of the layer's bias, as a factor whose input is one; a second one is not taken."""
        taken = self.bias is None
        self.bias = bias if taken else self.bias
        return taken

    @property
    def width(self) -> int:
        """Factors of an output that each term has: as many as its rank, and one of a bias."""
        return self.update.shape[1] + (self.bias is not None)

    def open_window(self, v: Tensor) -> None:
        """Take the window's V, float32 ``(in, r)``."""
        self.v = v
        self.product.take(self)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """``x_k W_k^T + bias`` of every block; see `Projection.linear`."""
        return self.product.linear(x, weight, bias, rows)

    def stage(self) -> None:
        """See `Projection.stage`."""
        self.product.stage()

    def gathered(self, chosen: Tensor | None) -> Tensor:
        """The factors of some outputs, or of all, float32 ``(blocks, 2 * width, out)``."""
        shift, outputs = self.shown.shift, slice(None) if chosen is None else chosen
        parts = [self.update[outputs].mT.expand(len(shift), -1, -1), shift[:, outputs].mT]
        if self.bias is not None:
            # What the blocks see of a bias is one sum in float32, in place of its two terms.
            shifted = self.bias.shift[:, outputs].unsqueeze(1)
            parts += [shifted, torch.zeros_like(shifted)]
        return torch.cat(parts, 1)

    def embed(self, lookup: Lookup, weight: Tensor) -> Tensor:
        """``W_k[token]`` of every block, ``(blocks, tokens, in)``, in the dtype of ``weight``."""
        mix, rank = self.shown.mix.weights, self.update.shape[1]
        found = lookup(torch.cat([self.update, *self.shown.directions], 1))
        found = found.view(len(mix), -1, mix.shape[1], rank)
        v, _ = self.product.projector(torch.float32)
        shift = torch.einsum("ktjr,kj->ktr", found, mix) @ v[:rank]
        return lookup(weight).view(shift.shape).float().mul_(self.keep).add_(shift).to(weight.dtype)

    @property
    def change(self) -> LowRankChange:
        """The accumulated update ``B V^T``."""
        return LowRankChange(self.update, self.v)


class LowRankSpace:
    """Directions, accumulated update and update rule of all sites: all that moves during a window.

    Args:
        sites: Of the layout, in order.
        method: What to tune, and how directions look.
        seed: The run's seed.
        device: Where all of it is.
        dtype: What linear layers multiply in.

    Attributes:
        stage: What the blocks of the last probe see; None before the window's first.
    """

    def __init__(
        self, sites: Sequence[Site], method: Method, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.method, self.device, self._dtype = method, device, dtype
        self.directions = LowRankDirections(
            sites,
            seed=seed,
            rank=method.rank,
            scale=method.scale,
            distribution=method.distribution,
            device=device,
        )
        self.factors = torch.zeros(self.directions.factors.size, device=device)
        self.stage: Stage | None = None
        self.rule: Rule = Momentum(method.momentum, len(self.factors), device) if method.momentum else Sgd()
        views = zip(sites, self.directions.factors.views(self.factors), strict=True)
        self.sites = {site: LowRankMatrix(view) if site.is_matrix else Vector(view) for site, view in views}
        self._drawn: dict[DirectionKey, Tensor] = {}
        self._taken: dict[DirectionKey, Tensor] = {}
        self._due = False
        self._stages: dict[tuple[int, int], Stage] = {}
        self.open_window(0)

    def open_window(self, index: int) -> None:
        """Draw V and start from no update."""
        self.window, self.stage = index, None
        self.factors.zero_()
        for (site, state), v in zip(self.sites.items(), self.directions.window(index), strict=True):
            state.keep, state.moves = 1.0, site.moves(index)
            if isinstance(state, LowRankMatrix) and v is not None:
                state.open_window(v)

    def probe(self, probes: Sequence[Probe]) -> None:
        """Make every site see the blocks of these probes, which `show` has yet to compute.

        Raises:
            ValueError: A probe is not of the current window.
        """
        keys = list(dict.fromkeys(probe.key for probe in probes if probe.key is not None))
        for key in keys:
            self._require(key)
        shape = len(probes), len(keys)
        if shape not in self._stages:
            with torch.inference_mode(False):
                self._stages[shape] = Stage(self.sites, self.directions, *shape, self._dtype)
        stage = self._stages[shape]
        if stage is not self.stage:
            stage.enter()
            self.stage = stage
        self._drawn, self._taken, self._due = {}, stage.take(probes, keys), True

    def show(self, given: Tensor | None = None) -> None:
        """Draw the directions of the last `probe` and let its blocks see them; see `Stage.show`."""
        # A graph draws whenever it is replayed, so it is captured with the draw, whatever has been drawn already.
        if self.stage is not None and (self._due or given is not None):
            self.stage.show(self.factors, self.window, given)
        self.shown()

    def shown(self) -> None:
        """Take the operations of `show` for done, whoever did them, so that `apply` need not draw again."""
        self._drawn, self._due = dict(self._taken), False

    def apply(self, update: Update, weights: Mapping[Site, Tensor], fold: Fold) -> None:
        """Move B by the update; at the end of a window fold it into the weights and open the next window."""
        if update.terms:
            self._decay(1 - update.lr * self.method.weight_decay)
            gradient = combine((self._draw(key), coefficient) for key, coefficient in update.terms)
            self.rule.step(self.factors, gradient, update.lr)
        self._drawn = {}
        if update.closes_window:
            moves = (Move(site, weights[site], state.change, state.keep) for site, state in self.sites.items())
            fold.add_all(moves, update.step)
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

    def _require(self, key: DirectionKey) -> None:
        if key.window != self.window:
            raise ValueError(f"got a direction of window {key.window}, but the current window is {self.window}")

    def _draw(self, key: DirectionKey) -> Tensor:
        self._require(key)
        if key not in self._drawn:
            self._drawn[key] = self.directions.draw(key)
        return self._drawn[key]

    def _decay(self, keep: float) -> None:
        if keep == 1.0:
            return
        for site, state in self.sites.items():
            if site.decays:
                state.update.mul_(keep)
                state.keep = in_float32(state.keep * keep)
