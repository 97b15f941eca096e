"""Bringing small tensors from the host to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device.

    A GPU takes it from pinned memory in its own time: an ordinary copy would first wait for all work it was given.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Inbox:
    """A tensor of a device that the host writes anew again and again.

    Attributes:
        there: The tensor, at first zeros.

    Args:
        shape: Of it.
        dtype: Of it.
        device: Its device. A GPU's has a tensor in pinned memory, which is kept: to get one anew takes longer than a
            copy.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.there = torch.zeros(*shape, dtype=dtype, device=device)
        self._pinned = torch.zeros(*shape, dtype=dtype, pin_memory=True) if device.type == "cuda" else None
        self._taken = torch.cuda.Event() if device.type == "cuda" else None

    def write(self, tensors: Sequence[Tensor]) -> None:
        """Write CPU tensors one behind the other, which may change at once; a GPU takes them in its own time."""
        if self._pinned is None or self._taken is None:
            self.there.copy_(torch.cat(list(tensors)))
            return
        self._taken.synchronize()
        torch.cat(list(tensors), out=self._pinned)
        self.there.copy_(self._pinned, non_blocking=True)
        self._taken.record(torch.cuda.current_stream(self.there.device))
