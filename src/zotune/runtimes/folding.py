"""Folding: adding accumulated updates into the weights without losing what is below half an ulp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from zotune.layout import Site
from zotune.noise import NoiseBlock
from zotune.runtimes.fused import FusedFold
from zotune.runtimes.rounding import stochastic_round

Change = Callable[[slice], Tensor]
"""Gives the float32 change of a range of rows of a site."""

_CHUNK = 1 << 19


class StochasticFold:
    """Rounds up or down with probabilities that make the result right on average, with keyed noise.

    The same key rounds the same way, so a replay gives the same bits. Float32 weights are simply added to.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self._fused = seed, FusedFold()

    def add(self, site: Site, weight: Tensor, change: Change, keep: float, step: int) -> None:
        """``weight <- keep * weight + change``, in place.

        Args:
            site: Whose weight it is.
            weight: Of the site's shape, in the model's dtype.
            change: The float32 change of some rows.
            keep: What weight decay leaves of the weight.
            step: The step that folds, which keys the rounding.
        """
        key = f"fold/{self.seed}/{step}"
        if weight.device.type == "cuda" and weight.dtype != torch.float32:
            self._fused.add(site.name, weight, change, keep, key, _chunks(weight))
            return
        for rows in _chunks(weight):
            part = weight[rows]
            total = part.float().mul_(keep).add_(change(rows))
            part.copy_(self._round(total, part.dtype, f"{site.name}[{rows.start}]", key))

    def _round(self, total: Tensor, dtype: torch.dtype, name: str, key: str) -> Tensor:
        if dtype == torch.float32:
            return total
        block = NoiseBlock([name], [tuple(total.shape)], "bits16", total.device)
        return stochastic_round(total, dtype, block.views(block.draw(key))[0])

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must keep: none."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


class MasterFold:
    """Keeps a float32 copy of every tuned weight on the host and rounds it to nearest into the model."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.master = {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in weights.items()}

    def add(self, site: Site, weight: Tensor, change: Change, keep: float, step: int) -> None:
        """``weight <- keep * weight + change`` in the copy, then rounded into ``weight``; see `StochasticFold.add`."""
        master = self.master[site.name]
        for rows in _chunks(weight):
            master[rows].mul_(keep).add_(change(rows).to("cpu"))
            weight[rows].copy_(master[rows])

    def state(self) -> dict[str, Tensor]:
        """The float32 copies."""
        return {f"master/{name}": tensor for name, tensor in self.master.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore the float32 copies."""
        for name, tensor in self.master.items():
            tensor.copy_(state[f"master/{name}"])


class Fold(Protocol):
    """What every fold offers; see `StochasticFold`."""

    def add(self, site: Site, weight: Tensor, change: Change, keep: float, step: int) -> None:
        """``weight <- keep * weight + change``."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must keep."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` gave."""
        ...


def _chunks(weight: Tensor) -> Iterator[slice]:
    """Ranges of rows of about half a million elements.

    Temporaries of that size are recycled by the allocator; larger ones go back to the system and fault in anew.
    """
    rows = max(1, _CHUNK * len(weight) // max(1, weight.numel()))
    for start in range(0, len(weight), rows):
        yield slice(start, min(start + rows, len(weight)))
