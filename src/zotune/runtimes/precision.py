"""Number formats: what they are called, and which of them matrix products run in."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

_NATIVE = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16"),
}
"""Instruction sets, as PyTorch names them, that multiply a format."""


def name(dtype: torch.dtype) -> str:
    """What a dtype is called in configurations and messages: ``float32``, ``bfloat16``, ..."""
    return str(dtype).removeprefix("torch.")


@lru_cache
def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype in which products of ``dtype`` operands are fastest on this device.

    It is ``dtype`` itself, except on processors that lack instructions for a 16-bit format: there the operands are
    widened to float32 first, which is several times faster and no less exact.
    """
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    # An older PyTorch cannot tell; float32 is then slower at worst, never wrong.
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return dtype if any(can.get(each) for each in _NATIVE[dtype]) else torch.float32
