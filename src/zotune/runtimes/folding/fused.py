"""The fold of a GPU: all matrices of a width in one pass, all vectors at once.

What `zotune.runtimes.folding.fold.StochasticFold` does for a chunk of rows after the other, with the same noise, would
be hundreds of thousands of launches for a large model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.noise import bits16_at, hashes, streams
from zotune.runtimes.folding.move import LowRankChange, Move
from zotune.runtimes.folding.rounding import stochastic_round
from zotune.transfer import onto

_LARGEST = 1 << 26
"""Elements of a change that exists in float32 for a moment, where it is not of low rank."""


@dataclass(frozen=True)
class _Noise:
    """Where the noise of sites that are folded together comes from.

    Attributes:
        names: Hashes of the names of the streams, uint64.
        device: Of the weights.
        stream: Of each element of vectors side by side, int64 ``(elements,)``; None for a matrix.
        at: Its place in there, of the same shape.
    """

    names: np.ndarray
    device: torch.device
    stream: Tensor | None = None
    at: Tensor | None = None


class FusedFold:
    """Folds sites in 16 bits, with what does not change from fold to fold kept.

    Args:
        rows: How many rows of a weight share a stream of noise.
    """

    def __init__(self, rows: Callable[[Tensor], int]) -> None:
        self._rows = rows
        self._noise: dict[tuple[str, ...], _Noise] = {}
        self._streams: dict[tuple[str, ...], Tensor] = {}
        self._key = ""

    def matrices(self, moves: Sequence[Move], key: str) -> None:
        """Move matrices, in place, by changes of low rank.

        Args:
            moves: All of one `kind`.
            key: Of the noise.
        """
        # Triton comes with PyTorch where there is a GPU, and only there.
        from zotune.runtimes.folding import kernel

        changes = [move.change for move in moves if isinstance(move.change, LowRankChange)]
        left = torch.cat([change.left for change in changes])
        right = torch.stack([change.right for change in changes]).mT.contiguous()
        weights, rows = [move.weight for move in moves], self._rows(moves[0].weight)
        names = tuple(move.site.name for move in moves)
        _, (starts, gammas) = self._of(names, key, lambda: _of_matrices(moves, rows))
        kernel.fold(weights, left, right, moves[0].keep, starts, gammas, rows)

    def matrix(self, move: Move, key: str) -> None:
        """Move a matrix in 16 bits, in place, by any change, with the noise of this key."""
        from zotune.runtimes.folding import kernel

        weight, alike = move.weight, self._rows(move.weight)
        _, (starts, gammas) = self._of((move.site.name,), key, lambda: _of_matrices([move], alike))
        step = max(1, _LARGEST // (alike * weight.shape[1]))
        for first in range(0, len(starts), step):
            part, rows = slice(first, first + step), slice(first * alike, (first + step) * alike)
            kernel.fold([weight[rows]], move.change(rows), None, move.keep, starts[part], gammas[part], alike)

    def vectors(self, moves: Sequence[Move], key: str) -> None:
        """Move vectors at once.

        Args:
            moves: All of one `kind`.
            key: Of the noise.
        """
        names, weights = tuple(move.site.name for move in moves), [move.weight for move in moves]
        noise, (starts, gammas) = self._of(names, key, lambda: _of_vectors(moves, self._rows))
        assert noise.stream is not None
        assert noise.at is not None
        bits = bits16_at(starts[noise.stream], gammas[noise.stream], noise.at)
        change = torch.cat([move.change(slice(None)) for move in moves])
        moved = stochastic_round(torch.cat(weights).float() * moves[0].keep + change, weights[0].dtype, bits)
        torch._foreach_copy_(weights, list(moved.split([len(weight) for weight in weights])))

    def _of(self, names: tuple[str, ...], key: str, noise: Callable[[], _Noise]) -> tuple[_Noise, Tensor]:
        """The noise of sites that are folded together, and starts and gammas of its streams, int64 ``(2, streams)``."""
        if key != self._key:
            self._key = key
            self._draw(self._noise)
        if names not in self._noise:
            self._noise[names] = noise()
            self._draw([names])
        return self._noise[names], self._streams[names]

    def _draw(self, known: Collection[tuple[str, ...]]) -> None:
        """Make the starts and gammas of all of these together."""
        if not known:
            return
        names = [self._noise[each].names for each in known]
        device = self._noise[next(iter(known))].device
        made = onto(streams(np.concatenate(names), self._key), device)
        self._streams |= zip(known, made.split([len(each) for each in names], dim=1), strict=True)


def kind(move: Move) -> Hashable:
    """What vectors, or matrices whose changes are of low rank, have in common that are folded at once."""
    weight = move.weight
    found: tuple[Any, ...] = weight.device, weight.dtype, move.keep
    if isinstance(move.change, LowRankChange):
        found += weight.shape[1], weight.stride(), move.change.left.shape[1]
    return found


def _of_matrices(moves: Sequence[Move], rows: int) -> _Noise:
    return _Noise(np.concatenate([_hashed(move, rows) for move in moves]), moves[0].weight.device)


def _of_vectors(moves: Sequence[Move], rows: Callable[[Tensor], int]) -> _Noise:
    hashed: list[np.ndarray] = []
    chosen: list[Tensor] = []
    places: list[Tensor] = []
    for move in moves:
        at, alike = torch.arange(len(move.weight)), rows(move.weight)
        chosen.append(at // alike + sum(len(each) for each in hashed))
        places.append(at % alike)
        hashed.append(_hashed(move, alike))
    device = moves[0].weight.device
    return _Noise(np.concatenate(hashed), device, torch.cat(chosen).to(device), torch.cat(places).to(device))


def _hashed(move: Move, alike: int) -> np.ndarray:
    return hashes([f"{move.site.name}[{start}]" for start in range(0, len(move.weight), alike)])
