"""The fold of a GPU: one pass over a weight, by a kernel that PyTorch's compiler makes.

What `zotune.runtimes.folding.StochasticFold` does for a chunk of rows after the other, with the same noise, would be
hundreds of thousands of launches for a large model. Here noise, sum and rounding are one kernel, which reads and writes
a weight once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from zotune.noise import bits16_at, hashes, streams
from zotune.runtimes.rounding import stochastic_round
from zotune.transfer import onto

_LARGEST = 1 << 26
"""Elements of a kernel; their change exists in float32 for a moment."""


@dataclass(frozen=True)
class _Site:
    """Where the noise of a site's elements comes from.

    Attributes:
        names: Hashes of the names of its streams, one per chunk of rows.
        chunk: The stream of each row, int64 ``(rows, 1)``.
        before: Elements of the stream before each row, int64 ``(rows, 1)``.
        step: Rows of a kernel.
    """

    names: np.ndarray
    chunk: Tensor
    before: Tensor
    step: int


class FusedFold:
    """Folds sites in 16 bits, with what does not change from fold to fold kept."""

    def __init__(self) -> None:
        self._sites: dict[str, _Site] = {}
        self._streams: dict[str, Tensor] = {}
        self._key = ""

    def add(
        self,
        name: str,
        weight: Tensor,
        change: Callable[[slice], Tensor],
        keep: float,
        key: str,
        chunks: Iterable[slice],
    ) -> None:
        """``weight <- keep * weight + change``, in place.

        Args:
            name: Of the site.
            weight: In 16 bits, of one or two dimensions.
            change: The float32 change of some rows.
            keep: What weight decay leaves of the weight.
            key: Of the noise.
            chunks: Rows with a stream of noise of their own, ascending, all but the last equally many; looked at the
                first time that a site is folded.
        """
        if key != self._key:
            self._key = key
            self._draw(self._sites)
        if name not in self._sites:
            self._sites[name] = _site(name, weight, list(chunks))
            self._draw([name])
        site, (starts, gammas) = self._sites[name], self._streams[name]
        for first in range(0, len(weight), site.step):
            rows = slice(first, first + site.step)
            part, moved = weight[rows], change(rows)
            if weight.dim() == 1:
                part, moved, rows = part.unsqueeze(0), moved.unsqueeze(0), slice(1)
            _kernel()(part, moved, keep, starts, gammas, site.chunk[rows], site.before[rows])

    def _draw(self, sites: Collection[str]) -> None:
        """Make starts and gammas of sites' streams, int64 ``(2, chunks)`` each, all of them together."""
        if not sites:
            return
        names = [self._sites[site].names for site in sites]
        device = self._sites[next(iter(sites))].chunk.device
        made = onto(torch.stack(streams(np.concatenate(names), self._key)), device)
        self._streams |= zip(sites, made.split([len(each) for each in names], dim=1), strict=True)


def _site(name: str, weight: Tensor, chunks: Sequence[slice]) -> _Site:
    per_chunk, vector = chunks[0].stop, weight.dim() == 1
    rows = torch.arange(1 if vector else len(weight), device=weight.device).unsqueeze(1)
    names = hashes([f"{name}[{chunk.start}]" for chunk in chunks])
    if vector:
        return _Site(names, rows, rows, len(weight))
    width = weight.shape[1]
    step = per_chunk * max(1, _LARGEST // (per_chunk * width))
    return _Site(names, rows // per_chunk, rows % per_chunk * width, step)


def fold_rows(
    part: Tensor, change: Tensor, keep: float, starts: Tensor, gammas: Tensor, chunk: Tensor, before: Tensor
) -> None:
    """Fold some rows, in place.

    Args:
        part: ``(rows, width)``, in 16 bits.
        change: Of the same shape, float32.
        keep: What weight decay leaves.
        starts: Of the site's streams, int64; ``gammas`` likewise, see `zotune.noise.streams`.
        gammas: See ``starts``.
        chunk: The stream of each row, int64 ``(rows, 1)``.
        before: Elements of the stream before each row, int64 ``(rows, 1)``.
    """
    at = before + torch.arange(part.shape[1], device=part.device)
    bits = bits16_at(starts[chunk], gammas[chunk], at)
    part.copy_(stochastic_round(part.float() * keep + change, part.dtype, bits))


@cache
def _kernel() -> Callable[..., None]:
    return torch.compile(fold_rows, dynamic=True)
