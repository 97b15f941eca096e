"""Folding: adding accumulated updates into the weights without losing what is below half an ulp."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from zotune.layout import Site
from zotune.noise import NoiseBlock
from zotune.runtimes.folding import fused
from zotune.runtimes.folding.fused import FusedFold
from zotune.runtimes.folding.move import LowRankChange, Move
from zotune.runtimes.folding.rounding import stochastic_round

_CHUNK = 1 << 19


class Fold(ABC):
    """Where accumulated updates go at the end of a window."""

    @abstractmethod
    def add(self, move: Move, step: int) -> None:
        """Move one site's weight, in place.

        Args:
            move: How.
            step: The step that folds, which keys the rounding.
        """

    def add_all(self, moves: Iterable[Move], step: int) -> None:
        """Move the weights of all sites that move together."""
        for move in moves:
            self.add(move, step)

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must keep: none, unless a fold says so."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - most have none
        """Restore what `state` gave."""


class StochasticFold(Fold):
    """Rounds up or down with probabilities that make the result right on average, with keyed noise.

    The same key rounds the same way, so a replay gives the same bits. Float32 weights are simply added to.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self._fused = seed, FusedFold(_rows)

    def add(self, move: Move, step: int) -> None:
        """See `Fold.add`."""
        self.add_all([move], step)

    def add_all(self, moves: Iterable[Move], step: int) -> None:
        """See `Fold.add_all`; a GPU folds at once what is of one kind: to launch takes longer than to fold."""
        key, together = f"fold/{self.seed}/{step}", defaultdict(list)
        for move in moves:
            if not _on_gpu(move.weight):
                self._add_by_chunks(move, key)
            elif move.weight.dim() == 1 or isinstance(move.change, LowRankChange):
                together[fused.kind(move)].append(move)
            else:
                # A change as large as the weight, so there must never be two of them.
                self._fused.matrix(move, key)
        for group in together.values():
            fold = self._fused.vectors if group[0].weight.dim() == 1 else self._fused.matrices
            fold(group, key)

    def _add_by_chunks(self, move: Move, key: str) -> None:
        weight = move.weight
        for rows in _chunks(weight):
            part = weight[rows]
            total = part.float()
            if move.keep != 1.0:
                total.mul_(move.keep)
            total.add_(move.change(rows))
            part.copy_(self._round(total, part.dtype, f"{move.site.name}[{rows.start}]", key))

    def _round(self, total: Tensor, dtype: torch.dtype, name: str, key: str) -> Tensor:
        if dtype == torch.float32:
            return total
        block = NoiseBlock([name], [tuple(total.shape)], "bits16", total.device)
        return stochastic_round(total, dtype, block.views(block.draw(key))[0])


class MasterFold(Fold):
    """Keeps a float32 copy of every tuned weight on the host and rounds it to nearest into the model."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.master = {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in weights.items()}

    def add(self, move: Move, step: int) -> None:
        """Move the copy, then round it into the weight; see `Fold.add`."""
        master = self.master[move.site.name]
        for rows in _chunks(move.weight):
            master[rows].mul_(move.keep).add_(move.change(rows).to("cpu"))
            move.weight[rows].copy_(master[rows])

    def state(self) -> dict[str, Tensor]:
        """The float32 copies."""
        return {f"master/{name}": tensor for name, tensor in self.master.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the float32 copies."""
        for name, tensor in self.master.items():
            tensor.copy_(state[f"master/{name}"])


def chosen_fold(fold: str, seed: int, weights: Mapping[Site, Tensor]) -> StochasticFold | MasterFold:
    """The fold of that name.

    Args:
        fold: ``stochastic`` or ``master``.
        seed: The run's seed.
        weights: What is to be folded into.
    """
    if fold == "stochastic":
        return StochasticFold(seed)
    return MasterFold({site.name: weight for site, weight in weights.items()})


def _on_gpu(weight: Tensor) -> bool:
    return weight.device.type == "cuda" and weight.dtype != torch.float32


def _rows(weight: Tensor) -> int:
    """Rows of about half a million elements, which have a stream of noise of their own.

    Temporaries of that size are recycled by the allocator; larger ones go back to the system and fault in anew.
    """
    return max(1, _CHUNK * len(weight) // max(1, weight.numel()))


def _chunks(weight: Tensor) -> Iterator[slice]:
    rows = _rows(weight)
    for start in range(0, len(weight), rows):
        yield slice(start, min(start + rows, len(weight)))
