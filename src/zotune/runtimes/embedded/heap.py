"""The heap: activations are freed and allocated thousands of times a step, and glibc gives large ones back each time.

Every page of a block that comes back from the kernel is a fault and is zeroed: a tenth to a quarter of a forward on two
cores (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

_AHEAD = 64 * 2**20
"""Bytes by which the heap grows at once."""

_MOST = 2**31 - 1
"""Bytes that may lie free at the heap's end before they are given back; what an int holds."""


def keep_freed() -> None:
    """Have this process keep what it frees for its next allocations, where the C library is glibc."""
    if (libc := _glibc()) is not None:
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST), (_M_TOP_PAD, _AHEAD)):
            libc.mallopt(option, value)


def give_back() -> None:
    """Give back what this process has freed so far, such as weights that are stored elsewhere now."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
