# A kernel takes what Triton makes of arguments, for which there are no types.
# mypy: allow-untyped-defs
"""The kernel of a GPU's fold: noise, sum and rounding of a matrix in one pass that reads and writes it once.

It is `zotune.runtimes.folding.StochasticFold` in Triton, for the same bits. What a pass would spend most of its time on
by itself are the noise's 64-bit products; here the four elements that share a word of it (`zotune.noise`) share its
computation, and a low-rank change is multiplied out where it is added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.runtimes.rounding import MANTISSA_BITS_CUT

_COLUMNS, _ROWS = 1024, 8
"""Of a program."""


def fold(
    weight: Tensor, left: Tensor, right: Tensor | None, keep: float, starts: Tensor, gammas: Tensor, alike: int
) -> None:
    """``weight <- keep * weight + left right^T``, rounded stochastically, in place.

    Args:
        weight: ``(rows, width)``, bfloat16 or float16.
        left: float32 ``(rows, r)``; without ``right`` the change itself, ``(rows, width)``.
        right: float32 ``(width, r)`` or None.
        keep: What weight decay leaves.
        starts: Of the streams of noise, int64 ``(streams,)``; ``gammas`` likewise, see `zotune.noise.streams`.
        gammas: See ``starts``.
        alike: How many rows share a stream.
    """
    rows, width = weight.shape
    # So that neighbours in a row read neighbours.
    other = left if right is None else right.T.contiguous()
    grid = triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS)
    with torch.cuda.device_of(weight):
        _fold[grid](
            *(weight, left, other, starts, gammas, rows, width, alike, keep),
            *(*weight.stride(), *left.stride(), other.stride(0)),
            RANK=0 if right is None else right.shape[1],
            ALIGNED=width % 4 == 0,
            CUT=MANTISSA_BITS_CUT[weight.dtype],
            COLUMNS=_COLUMNS,
            ROWS=_ROWS,
        )


@triton.jit
def _fold(
    weight,
    left,
    right,
    starts,
    gammas,
    rows,
    width,
    alike,
    keep,
    weight_row,
    weight_column,
    left_row,
    left_column,
    right_row,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    CUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    word = tl.program_id(1) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)[:, None]
    column = word * 4 + tl.arange(0, 4)[None, :]
    for index in range(ROWS):
        asked = tl.program_id(0) * ROWS + index
        row = tl.minimum(asked, rows - 1)
        here = column < tl.where(asked < rows, width, 0)
        stream, before = row // alike, row % alike * width
        at = before + column
        words = (before >> 2) + word if ALIGNED else at >> 2
        bits = _bits16(tl.load(starts + stream), tl.load(gammas + stream), words, at)
        place = weight + row.to(tl.int64) * weight_row + column.to(tl.int64) * weight_column
        own = left + row.to(tl.int64) * left_row
        if RANK == 0:
            change = tl.load(own + column * left_column, mask=here, other=0.0)
        else:
            change = tl.full((COLUMNS // 4, 4), 0.0, tl.float32)
            for j in range(RANK):
                u = tl.load(own + j * left_column)
                change += u * tl.load(right + j * right_row + column, mask=here, other=0.0)
        total = tl.load(place, mask=here, other=0.0).to(tl.float32) * keep + change
        tl.store(place, _rounded(total, bits, CUT).to(weight.dtype.element_ty), mask=here)


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
    """See `zotune.runtimes.rounding.stochastic_round`."""
    moved = values.to(tl.int32, bitcast=True) + (bits >> (16 - CUT))
    rounded = (moved & -(1 << CUT)).to(tl.float32, bitcast=True)
    if CUT == 13:
        steps = values * 16777216.0
        below = tl.floor(steps)
        small = (below + tl.floor(steps - below + bits.to(tl.float32) * 1.52587890625e-05)) * 5.9604644775390625e-08
        rounded = tl.where(tl.abs(values) < 6.103515625e-05, small, rounded)
    return rounded
