"""Attention over a pack, registered at transformers' attention interface as ``zotune``.

On a GPU all rows are one call of FlashAttention (Dao 2023), which takes sequences of any length; see `takes_spans`.
Elsewhere rows of about equal length are one call: gathered and padded at the right, where causal attention never looks.
A branch attends to its prompt's keys and to itself. On a CPU short rows take two batched products instead of the fused
kernel, which is called per row and head there; a soft cap needs them everywhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from zotune.errors import ModelError
from zotune.models import caps_attention, head_width
from zotune.runtimes.packing import Pack, Spans
from zotune.runtimes.precision import product_dtype

NAME = "zotune"
_WIDEST = 256
"""The widest heads that FlashAttention takes."""

_SHORT = 64
"""Keys up to which the batched products are faster on a CPU: twice at 16 to 64 keys, half as fast at 128 and more."""


class _Places:
    """Where tokens lie in activations flattened to ``(blocks * T * heads, width)``, and where they look.

    It is worked out once per forward, and kept no longer: masks of long rows are large.
    """

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        self._found: dict[Hashable, Tensor] = {}

    def gathered(self, side: str, blocks: int, heads: int) -> Tensor:
        """Places of ``(blocks * count, heads, length)`` for the queries or the keys of every group, flat."""
        key = (side, blocks, heads)
        if key not in self._found:
            block, head = self._numbers(blocks), self._numbers(heads)
            tokens = [getattr(group, side).unsqueeze(1) for group in self.pack.groups]
            at = [block.view(-1, 1, 1, 1) * len(self.pack.tokens) + each for each in tokens]
            self._found[key] = torch.cat([(each * heads + head.view(-1, 1)).flatten() for each in at])
        return self._found[key]

    def restored(self, blocks: int, heads: int) -> Tensor:
        """For every place, where in the groups' results, one group after the other, its token came to lie."""
        key = (blocks, heads)
        if key not in self._found:
            block, head = self._numbers(blocks), self._numbers(heads)
            parts, before = [], 0
            for group in self.pack.groups:
                count, length = group.queries.shape
                row = block.view(-1, 1) * count + group.real // length
                parts.append(before + (row.unsqueeze(2) * heads + head) * length + (group.real % length).unsqueeze(1))
                before += blocks * heads * group.queries.numel()
            self._found[key] = torch.cat(parts, 1).flatten()
        return self._found[key]

    def ends(self, lengths: Tensor, blocks: int) -> Tensor:
        """Where the sequences of all blocks begin and the last ends, from a block's lengths; int32."""
        key = (id(lengths), blocks)
        if key not in self._found:
            ends = lengths.repeat(blocks).cumsum(0)
            self._found[key] = torch.cat([ends.new_zeros(1), ends]).int()
        return self._found[key]

    def looked_at(self, seen: Tensor, blocks: int) -> Tensor:
        """The tokens that all blocks look at, flat, from those of a block."""
        key = (id(seen), blocks)
        if key not in self._found:
            self._found[key] = (self._numbers(blocks).view(-1, 1) * len(self.pack.tokens) + seen).flatten()
        return self._found[key]

    def mask(self, length: int, total: int, window: int | None) -> Tensor:
        """True where a query, one of the last ``length`` of ``total`` tokens, may look; bool ``(length, total)``."""
        key = ("mask", length, total, window)
        if key not in self._found:
            seen = self._numbers(total)
            at = seen[total - length :].unsqueeze(1)
            mask = seen <= at
            self._found[key] = mask if window is None else mask & (seen > at - window)
        return self._found[key]

    def hidden(self, length: int, total: int, window: int | None) -> Tensor:
        """The same as `additive` has it."""
        key = ("hidden", length, total, window)
        if key not in self._found:
            self._found[key] = additive(self.mask(length, total, window))
        return self._found[key]

    def _numbers(self, count: int) -> Tensor:
        return torch.arange(count, device=self.pack.tokens.device)


_current: ContextVar[_Places] = ContextVar("places")


@contextmanager
def attending(pack: Pack) -> Iterator[None]:
    """Inside, attention of models whose implementation is `NAME` follows this pack."""
    token = _current.set(_Places(pack))
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
    places = _current.get()
    heads, key_heads = query.shape[1], key.shape[1]
    blocks = query.shape[2] // len(places.pack.tokens)
    if places.pack.spans is not None:
        qkv = [x[0].transpose(0, 1) for x in (query, key, value)]
        return _flash(qkv, places, places.pack.spans, blocks, scaling, sliding_window).unsqueeze(0), None
    dtype = product_dtype(value.dtype, value.device.type)
    if all(_is_short(group.keys.shape[1], value.device) for group in places.pack.groups):
        # What `explicit` computes in, so that it need not convert what was gathered.
        dtype = torch.float32
    q, k, v = (x[0].transpose(0, 1).to(dtype).reshape(-1, x.shape[-1]) for x in (query, key, value))
    rows = zip(
        _by_group(q, places, "queries", blocks, heads),
        _by_group(k, places, "keys", blocks, key_heads),
        _by_group(v, places, "keys", blocks, key_heads),
        strict=True,
    )
    attended = (_attend(places, qkv, scaling, sliding_window, softcap) for qkv in rows)
    results = [each.to(value.dtype).reshape(-1, v.shape[1]) for each in attended]
    out = (torch.cat(results) if len(results) > 1 else results[0]).index_select(0, places.restored(blocks, heads))
    return out.view(1, -1, heads, v.shape[1]), None


def _by_group(x: Tensor, places: _Places, side: str, blocks: int, heads: int) -> list[Tensor]:
    """The ``(blocks * count, heads, length, width)`` of each group's queries or keys, from all tokens, flat."""
    tokens = [getattr(group, side) for group in places.pack.groups]
    gathered = x.index_select(0, places.gathered(side, blocks, heads))
    parts = gathered.split([blocks * heads * each.numel() for each in tokens])
    return [part.view(-1, heads, each.shape[1], x.shape[1]) for part, each in zip(parts, tokens, strict=True)]


def takes_spans(model: PreTrainedModel) -> bool:
    """Whether FlashAttention does a model's attention: 16 bits, an NVIDIA GPU from Ampere on, and no soft cap."""
    if model.device.type != "cuda":
        return False
    config = model.config.get_text_config()
    width = head_width(config)
    return (
        torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(model.device) >= (8, 0)
        and model.dtype in (torch.bfloat16, torch.float16)
        and width % 8 == 0
        and width <= _WIDEST
        # Keys and values of different widths.
        and not hasattr(config, "v_head_dim")
        and not caps_attention(config)
    )


def _flash(
    qkv: Sequence[Tensor], places: _Places, spans: Spans, blocks: int, scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention ``(blocks * T, heads, width)`` of all sequences; queries are the last tokens of the keys."""
    q, k, v = qkv
    if spans.seen is not None:
        seen = places.looked_at(spans.seen, blocks)
        k, v = k.index_select(0, seen), v.index_select(0, seen)
    begins, keys_begin = (places.ends(lengths, blocks) for lengths in (spans.queries, spans.keys))
    return _kernel(
        *(q, k, v, begins, keys_begin, *spans.longest),
        dropout_p=0.0,
        is_causal=True,
        return_debug_mask=False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )


def _kernel(*tensors: Any, **options: Any) -> Tensor:
    # PyTorch's public function for this is younger than the oldest release that we support.
    attended: Tensor = torch.ops.aten._flash_attention_forward(*tensors, **options)[0]
    return attended


def _attend(
    places: _Places, qkv: tuple[Tensor, ...], scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention ``(rows, heads, length, width)``; queries are the last tokens of the keys."""
    q, k, v = qkv
    length, total = q.shape[2], k.shape[2]
    if window is not None and window >= total:
        window = None
    if softcap is not None or _is_short(total, q.device):
        return explicit(q, k, v, places.hidden(length, total, window), scaling, softcap)
    grouped = q.shape[1] != k.shape[1]
    if window is None and length == total:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    mask = places.mask(length, total, window) if length > 1 or window is not None else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=grouped)


def _is_short(keys: int, device: torch.device) -> bool:
    return keys <= _SHORT and device.type == "cpu"


def explicit(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scaling: float | None, softcap: float | None = None
) -> Tensor:
    """Attention by two batched products, in float32 on a CPU.

    Args:
        q: ``(rows, heads, length, width)``.
        k: ``(rows, key heads, total, width)``; ``v`` likewise.
        v: See ``k``.
        hidden: See `additive`; float32, broadcast to ``(rows, heads, length, total)``.
        scaling: Factor of the scores; default ``width ** -0.5``.
        softcap: Scores pass through ``softcap * tanh(scores / softcap)``.

    Returns:
        ``(rows, heads, length, value width)`` in the dtype of ``v``.
    """
    rows, heads, length, width = q.shape
    shared, dtype = k.shape[1], torch.float32 if q.device.type == "cpu" else q.dtype
    # Query heads that share a key head are one longer product.
    folded = q.reshape(rows, shared, -1, width).to(dtype)
    scores = (folded @ k.mT.to(dtype)).float().view(rows, heads, length, -1)
    scale = width**-0.5 if scaling is None else scaling
    if softcap is not None:
        scores.mul_(scale / softcap).tanh_()
        scale = softcap
    weights = torch.add(hidden, scores, alpha=scale, out=scores).softmax(-1).to(dtype)
    attended = weights.view(rows, shared, -1, weights.shape[-1]) @ v.to(dtype)
    return attended.view(rows, heads, length, -1).to(v.dtype)


def additive(mask: Tensor) -> Tensor:
    """What a mask of where queries look adds to their scores, float32: 0 there, and minus infinity elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask that transformers is to make for packs: none, because a pack says who attends to whom."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, no_mask)
