"""The fold of a GPU: one pass over a weight, by a kernel that PyTorch's compiler makes.

What `zotune.runtimes.folding.StochasticFold` does for a chunk of rows after the other, with the same noise, would be
hundreds of thousands of launches for a large model. Here noise, sum and rounding are one kernel, which reads and writes
a weight once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from zotune.noise import bits16_at, hashes, streams
from zotune.runtimes.move import Move
from zotune.runtimes.rounding import stochastic_round
from zotune.transfer import onto

_LARGEST = 1 << 26
"""Elements of a kernel; their change exists in float32 for a moment."""


@dataclass(frozen=True)
class _Noise:
    """Where the noise of a matrix's rows, or of the elements of vectors side by side, comes from.

    Attributes:
        names: Hashes of the names of the streams.
        stream: Of each row or element, int64 ``(rows, 1)`` or ``(1, elements)``.
        before: Of the same shape: add an element's column to it, and you have its place in the stream.
    """

    names: np.ndarray
    stream: Tensor
    before: Tensor


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

    def matrix(self, move: Move, key: str) -> None:
        """Move a matrix in 16 bits, in place, with the noise of this key."""
        weight, alike = move.weight, self._rows(move.weight)
        noise, given = self._of((move.site.name,), key, lambda: _of_matrix(move, alike))
        step = alike * max(1, _LARGEST // (alike * weight.shape[1]))
        for first in range(0, len(weight), step):
            rows = slice(first, first + step)
            _kernel()(weight[rows], move.change(rows), move.keep, *given, noise.stream[rows], noise.before[rows])

    def vectors(self, moves: Sequence[Move], key: str) -> None:
        """Move vectors at once: one by one they take longer to launch than to fold.

        Args:
            moves: In the same 16 bits, on the same device, all with the same ``keep``.
            key: Of the noise.
        """
        names, weights = tuple(move.site.name for move in moves), [move.weight for move in moves]
        noise, given = self._of(names, key, lambda: _of_vectors(moves, self._rows))
        flat = torch.cat(weights).unsqueeze(0)
        change = torch.cat([move.change(slice(None)) for move in moves]).unsqueeze(0)
        _kernel()(flat, change, moves[0].keep, *given, noise.stream, noise.before)
        torch._foreach_copy_(weights, list(flat[0].split([len(weight) for weight in weights])))

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
        device = self._noise[next(iter(known))].stream.device
        made = onto(torch.stack(streams(np.concatenate(names), self._key)), device)
        self._streams |= zip(known, made.split([len(each) for each in names], dim=1), strict=True)


def _of_matrix(move: Move, alike: int) -> _Noise:
    rows = torch.arange(len(move.weight), device=move.weight.device).unsqueeze(1)
    return _Noise(_hashed(move, alike), rows // alike, rows % alike * move.weight.shape[1])


def _of_vectors(moves: Sequence[Move], rows: Callable[[Tensor], int]) -> _Noise:
    hashed: list[np.ndarray] = []
    chosen: list[Tensor] = []
    places: list[Tensor] = []
    for move in moves:
        at, alike = torch.arange(len(move.weight)), rows(move.weight)
        chosen.append(at // alike + sum(len(each) for each in hashed))
        places.append(at % alike)
        hashed.append(_hashed(move, alike))
    before = torch.cat(places) - torch.arange(sum(len(each) for each in places))
    stream, before = (each.unsqueeze(0).to(moves[0].weight.device) for each in (torch.cat(chosen), before))
    return _Noise(np.concatenate(hashed), stream, before)


def _hashed(move: Move, alike: int) -> np.ndarray:
    return hashes([f"{move.site.name}[{start}]" for start in range(0, len(move.weight), alike)])


def fold_rows(
    part: Tensor, change: Tensor, keep: float, starts: Tensor, gammas: Tensor, stream: Tensor, before: Tensor
) -> None:
    """Fold some rows, in place.

    Args:
        part: ``(rows, width)``, in 16 bits.
        change: Of the same shape, float32.
        keep: What weight decay leaves.
        starts: Of the streams, int64; ``gammas`` likewise, see `zotune.noise.streams`.
        gammas: See ``starts``.
        stream: Of each row or element, int64 ``(rows, 1)`` or ``(rows, width)``.
        before: Of the same shape: with an element's column, its place in the stream.
    """
    at = before + torch.arange(part.shape[1], device=part.device)
    bits = bits16_at(starts[stream], gammas[stream], at)
    part.copy_(stochastic_round(part.float() * keep + change, part.dtype, bits))


@cache
def _kernel() -> Callable[..., None]:
    return torch.compile(fold_rows, dynamic=True)
