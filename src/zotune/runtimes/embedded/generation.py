"""Greedy generation with a model that is wrapped for packs.

All prompts go through one packed forward; then each forward takes one token more of every row. Keys and values are kept
here, by attention module. So the wrapped modules see packs as ever and no prompt is padded, and nothing knows a model
family.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from zotune.models import context_length, head_width
from zotune.rows import Candidate, Row
from zotune.runtimes.embedded import attention
from zotune.runtimes.embedded.modules import Shape
from zotune.runtimes.packing import ACTIVATIONS, cut, pack
from zotune.runtimes.precision import product_dtype

NAME = "zotune-cached"
Tokens = tuple[int, ...]


def generate(
    model: PreTrainedModel,
    shape: Shape,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    stop: Collection[int],
    max_tokens: int,
) -> list[Tokens]:
    """Continue prompts with the likeliest tokens; see `zotune.runtimes.base.Runtime.generate`.

    Args:
        model: Wrapped by `zotune.runtimes.embedded.modules.wrap`, with every site showing one clean block.
        shape: What the wrapped modules read.
        prompts: At least one token each.
        max_new_tokens: At least 1.
        stop: Tokens that end a row.
        max_tokens: What prompts and new tokens of one batch may cost, in tokens of a forward.
    """
    context = context_length(model)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[Tokens] = [()] * len(prompts)
    with _attention(model, NAME):
        for part in cut([_cost(model, len(prompts[i]) + max_new_tokens) for i in order], max_tokens):
            batch = [prompts[i] for i in order[part]]
            # The last token of a row is not fed back, so it may lie one beyond what the model can take.
            limits = [min(max_new_tokens, context + 1 - len(prompt)) for prompt in batch]
            for i, tokens in zip(order[part], _continue(model, shape, batch, limits, stop), strict=True):
                found[i] = tokens
    return found


def _cost(model: PreTrainedModel, tokens: int) -> int:
    """Tokens of a forward that a row is worth: its logits, and its keys and values, which every layer keeps."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = head_width(config)
    activations = ACTIVATIONS * config.hidden_size
    kept = 2 * config.num_hidden_layers * heads * width
    return tokens * max(activations, kept) // activations + config.vocab_size // activations


def _continue(
    model: PreTrainedModel, shape: Shape, prompts: Sequence[Tokens], limits: Sequence[int], stop: Collection[int]
) -> list[Tokens]:
    """The tokens that follow prompts of ascending length, at most ``limits`` of each."""
    device = model.device
    cache = _Cache(prompts, max(map(len, prompts)) + max(limits), device)
    found: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    with _using(cache):
        logits = _read(model, shape, prompts)
        while True:
            newest = logits.argmax(-1)
            for row, token in zip(rows, newest.tolist(), strict=True):
                found[row].append(token)
            on = [at for at, row in enumerate(rows) if found[row][-1] not in stop and len(found[row]) < limits[row]]
            if not on:
                return [tuple(tokens) for tokens in found]
            if len(on) < len(rows):
                going = torch.tensor(on, device=device)
                rows, newest = [rows[at] for at in on], newest[going]
                cache.keep(going)
            logits = _forward(model, shape, newest, cache.lengths)
            cache.advance()


def _read(model: PreTrainedModel, shape: Shape, prompts: Sequence[Tokens]) -> Tensor:
    """Logits after each prompt, ``(prompts, vocabulary)``."""
    any_token = Candidate((0,), (0,))
    packed = pack([Row(prompt, (any_token,)) for prompt in prompts], normalised=True).to(model.device)
    with attention.attending(packed):
        return _forward(model, shape, packed.tokens, packed.positions, packed.kept)[packed.picked[0]]


def _forward(model: PreTrainedModel, shape: Shape, tokens: Tensor, positions: Tensor, kept: Tensor | int = 0) -> Tensor:
    """Logits ``(kept, vocabulary)`` of one block of tokens; 0 keeps all of them."""
    shape.blocks, shape.tokens, shape.vocabulary = 1, len(tokens), None
    logits: Tensor = model(
        input_ids=tokens[None], position_ids=positions[None], logits_to_keep=kept, use_cache=False
    ).logits
    return logits[0]


class _Cache:
    """Keys and values of the rows of a batch, each row's at the front of its share of a tensor.

    Attributes:
        lengths: Tokens of each row whose keys and values all modules have, int64 ``(rows,)``.
    """

    def __init__(self, prompts: Sequence[Tokens], room: int, device: torch.device) -> None:
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._longest, self._room = max(map(len, prompts)), room
        rows = torch.arange(len(prompts), device=device).repeat_interleave(self.lengths)
        positions = torch.cat([torch.arange(len(prompt), device=device) for prompt in prompts])
        self._prompts = rows, positions
        self._stored: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._stored

    def fill(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Store what a module computed of all prompts, laid out one after the other: ``(1, heads, T, width)`` each."""
        dtype = product_dtype(value.dtype, value.device.type)
        self._stored[module] = self._spread(key.to(dtype)), self._spread(value.to(dtype))

    def _spread(self, x: Tensor) -> Tensor:
        rows, positions = self._prompts
        # Zeros, because what is masked is still multiplied, and fresh memory may hold NaN.
        shares = x.new_zeros((len(self.lengths), x.shape[1], self._room, x.shape[3]))
        shares[rows, :, positions] = x[0].transpose(0, 1)
        return shares

    def extend(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token more of every row, ``(1, heads, rows, width)`` each; all keys and values so far."""
        rows = torch.arange(len(self.lengths), device=self.lengths.device)
        keys, values = self._stored[module]
        for shares, x in ((keys, key), (values, value)):
            shares[rows, :, self.lengths] = x[0].transpose(0, 1).to(shares.dtype)
        return keys[:, :, : self._longest + 1], values[:, :, : self._longest + 1]

    def seen(self, window: int | None) -> Tensor:
        """True where the newest token of a row may look; bool ``(rows, 1, 1, tokens of the longest row)``."""
        at = torch.arange(self._longest + 1, device=self.lengths.device)
        newest = self.lengths[:, None, None, None]
        return at <= newest if window is None else (at <= newest) & (at > newest - window)

    def advance(self) -> None:
        """Count the token that every module has stored of each row."""
        self.lengths += 1
        self._longest += 1

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.lengths = self.lengths[rows]
        self._longest = int(self.lengths.max())
        self._stored = {module: (keys[rows], values[rows]) for module, (keys, values) in self._stored.items()}


_current: ContextVar[_Cache] = ContextVar("cache")


@contextmanager
def _using(cache: _Cache) -> Iterator[None]:
    token = _current.set(cache)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def cached_attention(
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
    """Attention of the prompts when a module is first called, and after that of one token of every row.

    Arguments and result are those of `zotune.runtimes.embedded.attention.packed_attention`, with one block.
    """
    cache = _current.get()
    options: dict[str, Any] = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
    if module not in cache:
        cache.fill(module, key, value)
        return attention.packed_attention(module, query, key, value, attention_mask, **options, **kwargs)
    keys, values = cache.extend(module, key, value)
    q = query[0].transpose(0, 1).unsqueeze(2).to(keys.dtype)
    seen = cache.seen(sliding_window)
    if softcap is not None:
        out = attention.explicit(q, keys, values, attention.additive(seen), scaling, softcap)
    else:
        grouped = q.shape[1] != keys.shape[1]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=scaling, enable_gqa=grouped)
    return out.squeeze(2).unsqueeze(0).to(value.dtype), None


AttentionInterface.register(NAME, cached_attention)
AttentionMaskInterface.register(NAME, attention.no_mask)
