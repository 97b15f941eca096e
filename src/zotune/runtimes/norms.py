"""Normalisations whose formula is found by trying it, whatever a model calls them.

They are computed in place, which a processor's caches like: models' own code makes a new array of every operation. On
a GPU a compiler makes one kernel of each. A norm of another kind is called as it is, but for its gain and bias
(`zotune.runtimes.modules.TunedNorm`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Formula:
    """``(x - m) / sqrt(mean((x - m)^2) + eps) * (gain + offset) + bias``, over the last axis.

    Attributes:
        centred: Whether m is the mean of x; else it is 0.
        eps: See above.
        offset: What the module adds to its stored gain.
    """

    centred: bool
    eps: float
    offset: float

    @classmethod
    def fitting(cls, eps: float, fits: Callable[[Formula], bool]) -> Formula | None:
        """The first formula that fits; None where none does."""
        formulas = (cls(centred, eps, offset) for centred, offset in product((False, True), (0.0, 1.0)))
        return next(filter(fits, formulas), None)


def normalised_(x: Tensor, centred: bool, eps: float) -> Tensor:
    """A float32 tensor with the mean square of its last axis at one, in place; see `Formula`."""
    if centred:
        x.sub_(x.mean(-1, keepdim=True))
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return x.mul_(square.div_(x.shape[-1]).add_(eps).rsqrt_())


def formula(module: Any, twin: Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]) -> Formula | None:
    """The formula of a norm, found by trying it; None where none fits.

    Args:
        module: With a ``weight``, and perhaps a ``bias``.
        twin: Gives its forward with another weight and bias.
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        return None
    stored = module.weight
    tilt = torch.linspace(-1.3, 2.1, len(stored), device=stored.device)
    bias = tilt.flip(0) if getattr(module, "bias", None) is not None else None
    # As small as sqrt(eps), so that where it stands counts.
    x = torch.linspace(-1, 2, 3 * len(stored), device=stored.device).sin().view(3, -1) * eps**0.5
    with torch.no_grad():
        expected = twin(tilt, bias)(x)

        def fits(tried: Formula) -> bool:
            y = shown(x, tilt, torch.zeros_like(tilt), bias, None, tried.centred, eps, tried.offset)
            return torch.allclose(y, expected, atol=1e-4, rtol=1e-4)

        return Formula.fitting(eps, fits)


def shown(
    x: Tensor,
    gain: Tensor,
    gain_shift: Tensor,
    bias: Tensor | None,
    bias_shift: Tensor | None,
    centred: bool,
    eps: float,
    offset: float,
) -> Tensor:
    """``x`` normalised as `Formula` says, in float32 and then rounded to its dtype.

    Args:
        x: ``(..., n)``.
        gain: See `scaled`; and ``gain_shift``, ``bias`` and ``bias_shift``.
        gain_shift: See there.
        bias: See there.
        bias_shift: See there.
        centred: See `Formula`.
        eps: See there.
        offset: See there.
    """
    y = normalised_(x.to(torch.float32, copy=True), centred, eps)
    return scaled(y, gain, gain_shift, bias, bias_shift, offset).to(x.dtype)


def scaled(
    y: Tensor, gain: Tensor, gain_shift: Tensor, bias: Tensor | None, bias_shift: Tensor | None, offset: float
) -> Tensor:
    """``y * (gain + gain_shift + offset) + bias + bias_shift``, float32 like ``y``, which may be overwritten.

    Args:
        y: ``(..., n)``.
        gain: As stored, ``(n,)``.
        gain_shift: Of every block, float32, to be broadcast to y.
        bias: As stored, ``(n,)``, or None.
        bias_shift: Of every block, float32, to be broadcast to y, or None.
        offset: See `Formula`.
    """
    gain = gain_shift + gain + offset
    if bias is None:
        return y.mul_(gain)
    # In 16 bits a stored bias alone would promote element by element, which is several times slower.
    return torch.addcmul(bias.float() if bias_shift is None else bias_shift + bias, y, gain)


@cache
def kernel() -> Callable[..., Tensor]:
    """`shown`, compiled."""
    return torch.compile(shown)
