"""Rotary embedding (Su et al. 2021, RoFormer) in three operations instead of five.

Attention modules of transformers call a function ``apply_rotary_pos_emb`` of their own file. Where it turns one half of
a head against the other, as in most models, a module's forward gets another function by that name. On a CPU that one
leaves its results in float32, which attention there mostly multiplies in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "apply_rotary_pos_emb"


def wrap(model: nn.Module) -> None:
    """Let attention modules turn queries and keys by `turned`, until `unwrap` or that of `embedded.modules`."""
    for module in model.modules():
        # Below what only renames arguments.
        forward = inspect.unwrap(type(module).forward)
        if isinstance(forward, FunctionType) and _NAME in forward.__code__.co_names:
            known = forward.__globals__.get(_NAME)
            if known is not None and _turns_halves(known):
                module.forward = MethodType(_calling_turned(forward), module)


def unwrap(model: nn.Module) -> None:
    """Let attention modules call their file's function, which leaves the model's dtype to an attention of its own."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, MethodType) and forward.__func__.__globals__.get(_NAME) is turned:
            del module.__dict__["forward"]


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """``x cos + [-x_2, x_1] sin`` of queries and keys, with ``x_1`` and ``x_2`` the halves of what is turned of a head.

    Args:
        q: ``(batch, heads, tokens, width)``.
        k: ``(batch, key heads, tokens, width)``.
        cos: ``(batch, tokens, turned)``: of a head's first numbers, the others stay; ``sin`` likewise.
        sin: See ``cos``.
        unsqueeze_dim: Where heads are in ``q`` and ``k``.

    Returns:
        The same shapes; on a CPU float32.
    """
    dtype = torch.float32 if q.device.type == "cpu" else q.dtype
    cos, sin = (each.unsqueeze(unsqueeze_dim).to(dtype) for each in (cos, sin))
    width = cos.shape[-1]
    half = width // 2

    def one(x: Tensor) -> Tensor:
        x = x.to(dtype)
        y = x[..., :width] * cos
        y[..., :half].addcmul_(x[..., half:width], sin[..., :half], value=-1)
        y[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return y if width == x.shape[-1] else torch.cat([y, x[..., width:]], -1)

    return one(q), one(k)


@cache
def _turns_halves(known: Callable[..., Any]) -> bool:
    """Whether a model's function is what `turned` is, by trying it."""
    if list(inspect.signature(known).parameters) != list(inspect.signature(turned).parameters):
        return False
    # Every number another one, so that no place can be taken for another.
    q, k, cos, sin = torch.linspace(-1, 2, 112).sin().view(1, 14, 8).split([6, 4, 2, 2], 1)
    heads = q.view(1, 3, 2, 8), k.view(1, 2, 2, 8)
    try:
        alike = _alike(known(*heads, cos, sin), turned(*heads, cos, sin))
    except Exception:  # Whatever a foreign function raises when it is tried: it is not known to do the same.
        return False
    part = cos[..., :4], sin[..., :4]
    try:
        partly = known(*heads, *part)
    except RuntimeError:
        # One that takes no heads that are turned in part is never given any.
        return alike
    return alike and _alike(partly, turned(*heads, *part))


def _alike(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(map(torch.allclose, one, other))


def _calling_turned(forward: FunctionType) -> FunctionType:
    """A forward that calls `turned` where it called its file's function."""
    names = {**forward.__globals__, _NAME: turned}
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made
