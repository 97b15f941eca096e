"""Factors of all sites written into the buffers of all modules by a few operations, however many modules there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from zotune.layout import Site
from zotune.noise import NoiseBlock


class Shown(Protocol):
    """A module that shows factors in columns.

    Attributes:
        phi: What it shows; of any shape and dtype.
    """

    phi: Tensor

    def show(self, column: int, factors: Mapping[Site, Tensor]) -> None:
        """Take one column's factors of every site that it holds."""
        ...


class Scatter:
    """Makes the ``phi`` of modules views of one buffer per dtype, and knows where in it each factor goes.

    Args:
        modules: Their buffers move, so no graph may have been captured yet.
        sites: Of the layout, in order.
        layout: Of the flat buffer of all factors.
    """

    def __init__(self, modules: Sequence[Shown], sites: Sequence[Site], layout: NoiseBlock) -> None:
        dtypes = dict.fromkeys(module.phi.dtype for module in modules)
        groups = [[module for module in modules if module.phi.dtype == dtype] for dtype in dtypes]
        self._groups = [_Group(group, sites, layout) for group in groups]

    def show(self, column: int, flat: Tensor) -> None:
        """Write one column of every module from the factors of all sites, flat float32."""
        for group in self._groups:
            group.show(column, flat)


class _Group:
    """The modules of one dtype."""

    def __init__(self, modules: Sequence[Shown], sites: Sequence[Site], layout: NoiseBlock) -> None:
        sizes = [module.phi.numel() for module in modules]
        self._buffer = modules[0].phi.new_zeros(sum(sizes))
        factors = dict(zip(sites, layout.views(torch.arange(layout.size, device=layout.device)), strict=True))
        sources, places, steps = [], [], []
        for module, view, start in zip(modules, self._buffer.split(sizes), _starts(sizes), strict=True):
            (source, place), (_, next_place) = (_written(module, column, factors) for column in (0, 1))
            sources.append(source)
            places.append(place + start)
            steps.append(next_place - place)
            module.phi = view.view(module.phi.shape)
        self._places, self._steps = torch.cat(places), torch.cat(steps)
        # Half the bytes of the usual indices, of which a gather reads more than of what it gathers.
        self._sources = torch.cat(sources).to(torch.int32)
        self._last = 0, self._places

    def show(self, column: int, flat: Tensor) -> None:
        values = flat.index_select(0, self._sources).to(self._buffer.dtype)
        self._buffer.index_copy_(0, self._in_column(column), values)

    def _in_column(self, column: int) -> Tensor:
        """Places in a column; those of the last one are kept, for steps of one direction show no other but 0."""
        if column == 0:
            return self._places
        if self._last[0] != column:
            self._last = column, self._places + column * self._steps
        return self._last[1]


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:at]) for at in range(len(sizes))]


def _written(module: Shown, column: int, factors: dict[Site, Tensor]) -> tuple[Tensor, Tensor]:
    """Which flat factors a module shows in a column, and at which places of its ``phi``; found by letting it."""
    kept = module.phi
    module.phi = torch.full(kept.shape, -1, dtype=torch.int64, device=kept.device)
    module.show(column, factors)
    written, module.phi = module.phi.flatten(), kept
    places = (written >= 0).nonzero().flatten()
    return written[places], places
