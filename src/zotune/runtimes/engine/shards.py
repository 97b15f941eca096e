"""Which rows and columns of a whole site a worker has, and what moves tensors there and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.runtimes.engine.tokens import Part


def pack(part: Part) -> list[Any]:
    """Which rows and columns of a whole site a part is: ``[row indices or [start, stop], [start, stop]]``."""
    rows, columns = part.rows, part.columns
    bounds = [rows.start, rows.stop] if isinstance(rows, slice) else ["indices", *rows.tolist()]
    return [bounds, [columns.start, columns.stop]]


def unpack(place: Sequence[Any]) -> tuple[slice | Tensor, slice]:
    """The rows and columns that `pack` was given."""
    bounds, columns = place
    return torch.tensor(bounds[1:]) if bounds[0] == "indices" else slice(*bounds), slice(*columns)


def take(whole: Tensor, rows: slice | Tensor, columns: slice) -> Tensor:
    """What of a whole site's tensor lies there."""
    return whole[(rows, columns)[: whole.dim()]]


def put(whole: Tensor, rows: slice | Tensor, columns: slice, piece: Tensor) -> None:
    """Put a shard where it belongs in the whole."""
    whole[(rows, columns)[: whole.dim()]] = piece
