"""Normalisations whose formula is found by trying it, whatever a model calls them.

They are computed in place, which a processor's caches like: models' own code makes a new array of every operation. On
a GPU a compiler makes one kernel of each. A norm of another kind is called as it is, but for its gain and bias
(`zotune.runtimes.embedded.modules.TunedNorm`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from zotune.runtimes.own_forward import own_forward


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


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with an elementwise gain, by trying it.

    That is: one gain, perhaps a bias, no other parameter, and the output is ``normed(x) * (gain + offset) + bias``.
    """
    own = dict(module.named_parameters(recurse=False))
    gain = own.get("weight")
    if gain is None or gain.dim() != 1 or not set(own) <= {"weight", "bias"} or any(True for _ in module.children()):
        return False
    x = torch.linspace(-1, 2, 3 * len(gain), device=gain.device).view(1, 3, -1)
    # Another gain and bias for every feature, so that a module that mixes features is found out.
    tilt = torch.linspace(-1.3, 2.1, len(gain), device=gain.device)
    bias = tilt.flip(0) if "bias" in own else None
    try:
        with torch.no_grad():
            zero, one = (own_forward(module, torch.full_like(tilt, value))(x) for value in (0.0, 1.0))
            normed, offset = one - zero, float(zero.abs().max() > 1e-3)
            expected = normed * (tilt + offset) + (0.0 if bias is None else bias)
            plain = torch.allclose(zero, offset * normed, atol=1e-5)
            tilted = torch.allclose(own_forward(module, tilt, bias)(x), expected, atol=1e-5)
            return plain and tilted and bool(normed.any())
    except Exception:  # Whatever a foreign module raises when it is tried: it is not known to be a norm.
        return False


def gain_offset(module: Any) -> float:
    """What a norm adds to its stored gain: 1 in Gemma's, which store it less one, and else 0."""
    x = torch.linspace(-1, 2, 3 * len(module.weight), device=module.weight.device).view(1, 3, -1)
    nothing = torch.zeros_like(module.weight.data, dtype=torch.float32)
    return 1.0 if bool(own_forward(module, nothing)(x).abs().max() > 1e-3) else 0.0


def normalised_(x: Tensor, centred: bool, eps: float) -> Tensor:
    """A float32 tensor with the mean square of its last axis at one, in place; see `Formula`."""
    if centred:
        x.sub_(x.mean(-1, keepdim=True))
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return x.mul_(square.div_(x.shape[-1]).add_(eps).rsqrt_())


def formula(module: Any) -> Formula | None:
    """The formula of a norm with a ``weight``, and perhaps a ``bias``, found by trying it; None where none fits."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        return None
    stored = module.weight
    tilt = torch.linspace(-1.3, 2.1, len(stored), device=stored.device)
    bias = tilt.flip(0) if getattr(module, "bias", None) is not None else None
    # As small as sqrt(eps), so that where it stands counts.
    x = torch.linspace(-1, 2, 3 * len(stored), device=stored.device).sin().view(3, -1) * eps**0.5
    with torch.no_grad():
        expected = own_forward(module, tilt, bias)(x)

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
