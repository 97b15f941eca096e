"""Attention over a pack, registered at transformers' attention interface as ``zotune``.

Rows of equal length are one call of `scaled_dot_product_attention` with ``is_causal``, which needs no mask; a branch
attends to its prompt's keys and to itself. Only a sliding window shorter than a row, and a soft cap, need more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from zotune.errors import ModelError
from zotune.runtimes.packing import BranchGroup, Pack
from zotune.runtimes.precision import product_dtype

NAME = "zotune"
_current: ContextVar[Pack] = ContextVar("pack")


@contextmanager
def attending(pack: Pack) -> Iterator[None]:
    """Inside, attention of models whose implementation is `NAME` follows this pack."""
    token = _current.set(pack)
    try:
        yield
    finally:
        _current.reset(token)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of every row of the current pack, for all blocks at once.

    Args:
        module: The attention module (unused; the interface passes it).
        query: ``(1, heads, blocks * T, width)``.
        key: ``(1, key heads, blocks * T, width)``; ``value`` likewise.
        value: See ``key``.
        attention_mask: Always None: the pack says who attends to whom.
        scaling: Factor of the scores; default ``width ** -0.5``.
        sliding_window: Tokens that a token sees, itself included.
        softcap: Scores pass through ``softcap * tanh(scores / softcap)`` (Gemma 2).
        kwargs: What else transformers passes; attention sinks are refused, the rest has no effect on inference.

    Returns:
        ``(1, blocks * T, heads, width)``, and None for the attention weights.
    """
    if kwargs.get("s_aux") is not None:
        raise ModelError("attention sinks are not supported by packed attention; use a model without them")
    pack = _current.get()
    tokens = len(pack.tokens)
    # (blocks, T, heads, width), the memory order in which projections write
    dtype = product_dtype(value.dtype, value.device.type)
    q, k, v = (x.to(dtype).transpose(1, 2).unflatten(1, (-1, tokens))[0] for x in (query, key, value))
    out = value.new_empty((*q.shape[:3], v.shape[3]))
    for group in pack.groups:
        end = group.start + group.count * group.length
        split = (group.count, group.length)
        own = [x[:, group.start : end].unflatten(1, split) for x in (q, k, v)]
        if isinstance(group, BranchGroup):
            own[1:] = [torch.cat([x[:, group.prompts], y], 2) for x, y in zip((k, v), own[1:], strict=True)]
        rows_first = tuple(x.flatten(0, 1).transpose(1, 2) for x in own)
        attended = _attend(rows_first, scaling, sliding_window, softcap)
        out[:, group.start : end].unflatten(1, split).copy_(attended.transpose(1, 2).unflatten(0, (-1, group.count)))
    return out.flatten(0, 1).unsqueeze(0), None


def _attend(qkv: tuple[Tensor, ...], scaling: float | None, window: int | None, softcap: float | None) -> Tensor:
    """Causal attention ``(rows, heads, length, width)``; queries are the last tokens of the keys."""
    q, k, v = qkv
    length, total = q.shape[2], k.shape[2]
    if window is not None and window >= total:
        window = None
    if softcap is not None:
        return _soft_capped(q, k, v, scaling, _mask(length, total, window, q.device), softcap)
    grouped = q.shape[1] != k.shape[1]
    if window is None and length == total:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    mask = _mask(length, total, window, q.device) if length > 1 or window is not None else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=grouped)


def _soft_capped(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, mask: Tensor, softcap: float) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    return scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype) @ v


@lru_cache(maxsize=256)
def _mask(length: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query, one of the last ``length`` of ``total`` tokens, may look; bool ``(length, total)``."""
    at = torch.arange(total - length, total, device=device).unsqueeze(1)
    seen = torch.arange(total, device=device)
    mask = seen <= at
    return mask if window is None else mask & (seen > at - window)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)
