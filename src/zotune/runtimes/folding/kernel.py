# A kernel takes what Triton makes of arguments, for which there are no types.
# mypy: allow-untyped-defs
"""The kernel of a GPU's fold: noise, sum and rounding of matrices in one pass that reads and writes them once.

It is `zotune.runtimes.folding.fold.StochasticFold` in Triton, for the same bits. What a pass would spend most of its
time on by itself are the noise's 64-bit products; here the four elements that share a word of it (`zotune.noise`) share
its computation, and a low-rank change is multiplied out where it is added. All matrices of a width are one launch,
because launching takes longer than folding one of a small model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.runtimes.folding.rounding import MANTISSA_BITS_CUT
from zotune.transfer import onto

_COLUMNS, _ROWS = 1024, 8
"""Of a program."""


def fold(
    weights: Sequence[Tensor],
    left: Tensor,
    right: Tensor | None,
    keep: float,
    starts: Tensor,
    gammas: Tensor,
    alike: int,
) -> None:
    """``weight <- keep * weight + left right^T`` of every weight, rounded stochastically, in place.

    Args:
        weights: Each ``(rows, width)``, bfloat16 or float16, alike in all but their rows.
        left: float32 ``(rows of all, r)``; without ``right`` the change itself, ``(rows of all, width)``.
        right: float32 ``(weights, r, width)`` or None.
        keep: What weight decay leaves.
        starts: Of the streams of noise, int64 ``(streams of all,)``; ``gammas`` likewise, see `zotune.noise.streams`.
        gammas: See ``starts``.
        alike: How many rows of a weight share a stream.
    """
    first, width = weights[0], weights[0].shape[1]
    offsets = [(each.data_ptr() - first.data_ptr()) // first.itemsize for each in weights]
    table, row, stream = [], 0, 0
    for weight, offset in zip(weights, offsets, strict=True):
        table.append((offset, len(weight), row, stream))
        row, stream = row + len(weight), stream + -(-len(weight) // alike)
    programs = _programs(tuple(map(len, weights)), first.device)
    given = left if right is None else right
    with torch.cuda.device_of(first):
        _fold[len(programs), triton.cdiv(width, _COLUMNS)](
            *(first, left, given, starts, gammas, onto(torch.tensor(table), first.device), programs),
            *(width, alike, keep, *first.stride(), *left.stride()),
            RANK=0 if right is None else right.shape[1],
            WORDS_ARE_ROWS=width % 4 == 0,
            ALIGNED=all(offset % 8 == 0 for offset in offsets),
            CUT=MANTISSA_BITS_CUT[first.dtype],
            COLUMNS=_COLUMNS,
            ROWS=_ROWS,
        )


@lru_cache(maxsize=64)
def _programs(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """The weight and the first row of every program, int32 ``(programs, 2)``."""
    parts = [torch.arange(0, count, _ROWS) for count in rows]
    owners = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(part) for part in parts]))
    return torch.stack([owners, torch.cat(parts)], 1).int().to(device)


@triton.jit
def _fold(
    weights,
    left,
    right,
    starts,
    gammas,
    table,
    programs,
    width,
    alike,
    keep,
    weight_row,
    weight_column,
    left_row,
    left_column,
    RANK: tl.constexpr,
    WORDS_ARE_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    # What is multiplied by it below, a place among the factors of all matrices, may be beyond 32 bits.
    own = tl.load(programs + 2 * tl.program_id(0)).to(tl.int64)
    top = tl.load(programs + 2 * tl.program_id(0) + 1)
    offset, rows = tl.load(table + 4 * own), tl.load(table + 4 * own + 1).to(tl.int32)
    above, streams = tl.load(table + 4 * own + 2), tl.load(table + 4 * own + 3)
    if ALIGNED:
        offset = tl.multiple_of(offset, 8)
    word = tl.program_id(1) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)[:, None]
    column = word * 4 + tl.arange(0, 4)[None, :]
    for index in range(ROWS):
        row = tl.minimum(top + index, rows - 1)
        here = column < tl.where(top + index < rows, width, 0)
        stream, before = streams + row // alike, row % alike * width
        at = before + column
        words = (before >> 2) + word if WORDS_ARE_ROWS else at >> 2
        bits = _bits16(tl.load(starts + stream), tl.load(gammas + stream), words, at)
        added = left + (above + row) * left_row
        if RANK == 0:
            change = tl.load(added + column * left_column, mask=here, other=0.0)
        else:
            change = tl.full((COLUMNS // 4, 4), 0.0, tl.float32)
            for j in range(RANK):
                u = tl.load(added + j * left_column)
                change += u * tl.load(right + (own * RANK + j) * width + column, mask=here, other=0.0)
        place = weights + offset + row.to(tl.int64) * weight_row + column.to(tl.int64) * weight_column
        total = tl.load(place, mask=here, other=0.0).to(tl.float32) * keep + change
        tl.store(place, _rounded(total, bits, CUT).to(weights.dtype.element_ty), mask=here)


@triton.jit
def _bits16(start, gamma, words, at):
    """See `zotune.noise.bits16_at`."""
    x = (start + gamma * words.to(tl.int64)).to(tl.uint64, bitcast=True)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return ((x >> ((at & 3) * 16).to(tl.uint64)) & 0xFFFF).to(tl.int32)


@triton.jit
def _rounded(values, bits, CUT: tl.constexpr):
    """See `zotune.runtimes.folding.rounding.stochastic_round`."""
    moved = values.to(tl.int32, bitcast=True) + (bits >> (16 - CUT))
    rounded = (moved & -(1 << CUT)).to(tl.float32, bitcast=True)
    if CUT == 13:
        steps = values * 16777216.0
        below = tl.floor(steps)
        small = (below + tl.floor(steps - below + bits.to(tl.float32) * 1.52587890625e-05)) * 5.9604644775390625e-08
        rounded = tl.where(tl.abs(values) < 6.103515625e-05, small, rounded)
    return rounded
