"""Dense perturbation: MeZO's directions, added to one weight at a time inside the forward.

Block k sees ``W + mix[k] z``. Only one site's direction and one perturbed copy of its weight exist at a time, and the
stored weights change nowhere but in `DenseSpace.apply`: there is nothing to restore after a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zotune.directions import DenseDirections
from zotune.layout import Site
from zotune.optimizer import Method
from zotune.protocol import DirectionKey, Probe, Update
from zotune.runtimes.folding.fold import Fold
from zotune.runtimes.folding.move import Move
from zotune.runtimes.spaces.mixture import Lookup, Mixture, Vector
from zotune.updates import combine, in_float32

Draw = Callable[[], Tensor]


class DenseMatrix:
    """A linear or embedding weight as every block sees it; see `zotune.runtimes.spaces.lowrank.LowRankMatrix`."""

    keep, moves = 1.0, True

    def carry(self, bias: Vector) -> bool:
        """See `LowRankMatrix.carry`; false, because here a bias is shifted by itself."""
        return False

    def probe(self, directions: Sequence[Draw], mix: Mixture) -> None:
        """Take how to draw this step's directions, and how the blocks mix them."""
        self._directions = directions
        self._mix = mix.weights.tolist()

    def stage(self) -> None:
        """Nothing is made ready: a direction is drawn where it is used."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """``x_k W_k^T + bias`` of every block; arguments as in `LowRankMatrix.linear`."""
        if not self.moves:
            return F.linear(x, weight, bias)
        y = x.new_empty(*x.shape[:2], len(weight))
        for block in self._unmoved():
            y[block] = F.linear(x[block], weight, bias)
        for draw, moved in self._moved():
            shift = draw() if rows is None else draw()[rows]
            for block, amount in moved:
                y[block] = F.linear(x[block], torch.add(weight, shift, alpha=amount).to(x.dtype), bias)
        return y

    def embed(self, lookup: Lookup, weight: Tensor) -> Tensor:
        """``W_k[token]`` of every block, ``(blocks, tokens, in)``, in the dtype of ``weight``."""
        found = lookup(weight)
        y = found.reshape(len(self._mix), -1, found.shape[-1]).float()
        for draw, moved in self._moved():
            shift = lookup(draw()).view(y.shape)
            for block, amount in moved:
                y[block].add_(shift[block], alpha=amount)
        return y.to(weight.dtype)

    def change(self, rows: slice) -> float:
        """The update that is not in the weights yet: none."""
        return 0.0

    def _unmoved(self) -> list[int]:
        return [block for block, row in enumerate(self._mix) if not any(row[1:])]

    def _moved(self) -> Iterator[tuple[Draw, list[tuple[int, float]]]]:
        """Each direction with the blocks that it moves and how far."""
        for j, draw in enumerate(self._directions, start=1):
            yield draw, [(block, row[j]) for block, row in enumerate(self._mix) if row[j]]


class DenseSpace:
    """Directions of all sites; updates go straight into the weights, so every step is a window of its own."""

    def __init__(self, sites: Sequence[Site], method: Method, seed: int, device: torch.device) -> None:
        self.method, self.device = method, device
        self.directions = DenseDirections(sites, seed=seed, distribution=method.distribution, device=device)
        self.sites = {
            site: DenseMatrix() if site.is_matrix else Vector(torch.zeros(site.shape, device=device)) for site in sites
        }
        self.window = 0

    def show(self) -> None:
        """Nothing: dense directions are drawn where they are added."""

    def probe(self, probes: Sequence[Probe]) -> None:
        """Make every site show the blocks of these probes.

        Raises:
            ValueError: A probe is not of the current step.
        """
        keys = list(dict.fromkeys(probe.key for probe in probes if probe.key is not None))
        mix = Mixture.of(probes, keys, self.device)
        for site, state in self.sites.items():
            state.moves = site.moves(self.window)
            draws = [self._draw(key, site) for key in keys]
            if isinstance(state, Vector):
                shown = torch.stack([state.update, *(draw() for draw in draws)])
                state.shift = mix.weights @ shown if state.moves else state.update.unsqueeze(0)
            else:
                state.probe(draws, mix)

    def apply(self, update: Update, weights: Mapping[Site, Tensor], fold: Fold) -> None:
        """``W <- (1 - lr * decay) W - lr * sum_i c_i z_i``, site by site."""
        if update.terms:
            fold.add_all(self._moves(update, weights), update.step)
        self.window = update.window + 1

    def _moves(self, update: Update, weights: Mapping[Site, Tensor]) -> Iterator[Move]:
        for site in self.sites:
            keep = 1 - update.lr * self.method.weight_decay if site.decays else 1.0
            if keep == 1.0 and not site.moves(update.window):
                continue
            amounts = [(key, in_float32(-update.lr * coefficient)) for key, coefficient in update.terms]
            change = combine((self._draw(key, site)(), amount) for key, amount in amounts)
            yield Move(site, weights[site], change.__getitem__, keep)

    def state(self) -> dict[str, Tensor]:
        """Nothing: all that moved is in the weights."""
        return {}

    def load_state(self, state: dict[str, Tensor], window: int) -> None:
        """Continue at this step."""
        self.window = window

    def _require(self, key: DirectionKey) -> None:
        if key.window != self.window:
            raise ValueError(f"got a direction of window {key.window}, but the current window is {self.window}")

    def _draw(self, key: DirectionKey, site: Site) -> Draw:
        self._require(key)
        return partial(self.directions.draw, key, site)
