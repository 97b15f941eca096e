"""Which rows and columns of a whole site a worker has, and what moves tensors there and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.runtimes.engine.tokenwise import Part


def pack(part: Part) -> list[Any]:
    """Which rows and columns of a whole site a part is: ``[row indices or [start, stop], [start, stop]]``."""
    rows, columns = part.rows, part.columns
    bounds = [rows.start, rows.stop] if isinstance(rows, slice) else ["indices", *rows.tolist()]
    return [bounds, [columns.start, columns.stop]]


def take(whole: Tensor, place: Sequence[Any]) -> Tensor:
    """What of a whole site's tensor lies at a place that `pack` gave."""
    bounds, columns = place
    rows = whole[torch.tensor(bounds[1:])] if bounds[0] == "indices" else whole[slice(*bounds)]
    return rows[:, slice(*columns)] if rows.dim() == 2 else rows


def put(whole: Tensor, place: Sequence[Any], piece: Tensor) -> None:
    """Put a shard where it belongs in the whole."""
    bounds, columns = place
    rows = torch.tensor(bounds[1:]) if bounds[0] == "indices" else torch.arange(len(whole))[slice(*bounds)]
    if whole.dim() == 2:
        whole[rows, slice(*columns)] = piece
    else:
        whole[rows] = piece
