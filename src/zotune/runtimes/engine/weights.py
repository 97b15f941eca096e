"""The weights of one worker: where they are plain, how a fold reaches them, and their shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zotune.layout import Site
from zotune.protocol import Update
from zotune.runtimes.engine import shards
from zotune.runtimes.engine.layers import Place, Space
from zotune.runtimes.engine.tokens import Part
from zotune.runtimes.folding.fold import Fold, MasterFold, StochasticFold, chosen_fold
from zotune.runtimes.folding.move import Move


class Weights:
    """The tuned weights that are here, as plain tensors that a fold may change.

    An engine may keep a weight in another form (packed for the processor's products). Then its plain form is read back
    once, kept on the host, and given to the engine anew after every fold.

    Args:
        places: Where the sites are.
        plain: Gives a module's parameter in plain form: the engine's own tensor, or a copy.
        repack: Has the engine prepare a module's weight anew from its plain form.
        seed: The run's seed.
        fold: ``stochastic`` or ``master``; see `zotune.runtimes.folding.fold`.
    """

    def __init__(
        self,
        places: Sequence[Place],
        plain: Callable[[Place], Tensor],
        repack: Callable[[Any, Tensor], None],
        seed: int,
        fold: str,
    ) -> None:
        self._repack = repack
        self.parts = {place.part.site: place.part for place in places}
        self._stored: dict[tuple[str, str], tuple[Place, Tensor]] = {}
        for place in places:
            key = (place.path, place.parameter)
            if key not in self._stored:
                self._stored[key] = place, plain(place)
        self.views = {
            place.part.site: self._stored[place.path, place.parameter][1][place.part.local] for place in places
        }
        self.fold = ShardFold(chosen_fold(fold, seed, self.views), self.parts)

    def apply(self, space: Space, update: Update) -> None:
        """Let the space move by the update; after a fold the engine has the new weights."""
        space.apply(update, self.views, self.fold)
        if space.goes_into_weights(update):
            self.repack()

    def repack(self) -> None:
        """Give the engine every weight as it is now."""
        for place, stored in self._stored.values():
            self._repack(place, stored)

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint that are sharded: the weights, and the fold's copies."""
        return {f"weight/{site.name}": weight for site, weight in self.views.items()} | self.fold.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave, from whole tensors."""
        for site, weight in self.views.items():
            weight.copy_(_shard(state[f"weight/{site.name}"], self.parts[site]))
        parts = {name: self.part_of(name) for name in self.fold.state()}
        self.fold.load_state({name: _shard(state[name], part) for name, part in parts.items() if part is not None})
        self.repack()

    def part_of(self, name: str) -> Part | None:
        """Which part of a tensor of the state is here; None where all of it is."""
        wanted = name.partition("/")[2]
        return next((part for site, part in self.parts.items() if site.name == wanted), None)


class ShardFold(Fold):
    """A fold of shards that gives the bits which the fold of the whole weight would give."""

    def __init__(self, fold: StochasticFold | MasterFold, parts: Mapping[Site, Part]) -> None:
        self._fold, self._parts = fold, parts

    def add(self, move: Move, step: int) -> None:
        """See `Fold.add`; for the part of the site that the weight is."""
        site, weight, part = move.site, move.weight, self._parts[move.site]
        if self._is_whole(move):
            self._fold.add(move, step)
        elif isinstance(self._fold, MasterFold):
            self._fold.add(replace(move, change=_shard(move.change(slice(None)), part).__getitem__), step)
        else:
            # The noise is that of the whole weight: a shard cannot draw its own rows and columns of it alone.
            whole = torch.zeros(site.shape, dtype=weight.dtype, device=weight.device)
            shards.put(whole, part.rows, part.columns, weight)
            self._fold.add(replace(move, weight=whole), step)
            weight.copy_(_shard(whole, part))

    def add_all(self, moves: Iterable[Move], step: int) -> None:
        """See `Fold.add_all`."""
        self._fold.add_all(self._whole(moves, step), step)

    def _whole(self, moves: Iterable[Move], step: int) -> Iterator[Move]:
        """The moves of whole sites; shards are moved meanwhile, for changes may be too large to be kept until later."""
        for move in moves:
            if self._is_whole(move):
                yield move
            else:
                self.add(move, step)

    def _is_whole(self, move: Move) -> bool:
        return tuple(move.weight.shape) == move.site.shape and isinstance(self._parts[move.site].rows, slice)

    def state(self) -> dict[str, Tensor]:
        """Of the fold inside."""
        return self._fold.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Into the fold inside."""
        self._fold.load_state(state)


def _shard(whole: Tensor, part: Part) -> Tensor:
    """The part of a whole site's tensor that is here."""
    return shards.take(whole, part.rows, part.columns)
