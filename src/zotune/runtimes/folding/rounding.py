"""Stochastic rounding to 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

MANTISSA_BITS_CUT = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32 that its rounding to a dtype cuts off."""
_FLOAT16_SMALLEST_NORMAL = 2.0**-14
_FLOAT16_STEP_BELOW = 2.0**-24


def stochastic_round(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 ``values`` to a neighbour in ``dtype``, the nearer the likelier.

    Args:
        values: float32, finite.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        bits: int32 of the same shape, uniform in ``0 .. 65535``.

    Returns:
        Tensor of ``dtype`` whose expectation over ``bits`` is ``values``, to 16 bits of probability.
    """
    cut = MANTISSA_BITS_CUT[dtype]
    # Adding uniform low bits to the magnitude carries into the kept bits with the right probability.
    low = bits if cut == 16 else bits >> (16 - cut)
    rounded = values.view(torch.int32).add(low).bitwise_and_(-(1 << cut)).view(torch.float32)
    if dtype == torch.float16:
        steps = values / _FLOAT16_STEP_BELOW
        whole = steps.floor()
        # The fraction is added by itself, because float32 cannot hold it to 16 bits beside a large whole.
        small = (whole + (steps - whole + bits / 65536).floor()) * _FLOAT16_STEP_BELOW
        rounded = torch.where(values.abs() < _FLOAT16_SMALLEST_NORMAL, small, rounded)
    return rounded.to(dtype)
