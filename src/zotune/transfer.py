"""Bringing small tensors from the host to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device.

    A GPU takes it from pinned memory in its own time: an ordinary copy would first wait for all work it was given.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def into(there: Tensor, tensor: Tensor) -> None:
    """Write a CPU tensor into one of a device, as `onto` does."""
    there.copy_(tensor.pin_memory() if there.device.type == "cuda" else tensor, non_blocking=True)
