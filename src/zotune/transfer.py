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
    """A tensor of a GPU that the host writes anew again and again.

    Attributes:
        there: The tensor, at first zeros.

    Args:
        size: Elements of it, int64.
        device: The GPU. Pinned memory is kept beside it: to get some anew takes longer than a copy.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.there = torch.zeros(size, dtype=torch.int64, device=device)
        self._pinned = torch.zeros(size, dtype=torch.int64, pin_memory=True)
        self._taken = torch.cuda.Event()

    def write(self, tensors: Sequence[Tensor]) -> None:
        """Write flat CPU tensors one behind the other, which may change at once; the GPU takes them in its own time."""
        self._taken.synchronize()
        torch.cat(list(tensors), out=self._pinned)
        self.there.copy_(self._pinned, non_blocking=True)
        self._taken.record(torch.cuda.current_stream(self.there.device))
