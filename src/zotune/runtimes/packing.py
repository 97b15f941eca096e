"""Packing: rows become one unpadded sequence, a copy of it per probe.

A pack has K *blocks*, one per probe, each with the same T tokens: first the prompts, sorted by length, then the
candidates' branches. Rows of about equal length lie side by side, so attention is a handful of dense calls, and an
operation that differs per probe is a batched matmul over blocks. Only attention ever sees padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zotune.rows import Row
from zotune.transfer import onto

ACTIVATIONS = 16
"""Vectors of the hidden width that the activations of a token take, about."""

_LENGTHS = 16
"""Attention pads lengths to multiples of this: fewer calls, and shapes that batched products are good at."""

_LONGEST = 128
"""The longest sequence of spans counts as a multiple of this: kernels do nothing for what is not there."""


@dataclass(frozen=True)
class Group:
    """Rows or branches that attend in one call, padded at the right with tokens whose result is dropped.

    Attributes:
        start: The first of their tokens, which lie side by side, within a block.
        stop: One past the last.
        queries: Token indices within a block, int64 ``(count, length)``.
        keys: What the queries look at causally, int64 ``(count, before + length)``: the branch's prompt, if any, and
            the queries themselves.
        real: Places in ``queries``, flattened, of the tokens from ``start`` to ``stop``, int64.
    """

    start: int
    stop: int
    queries: Tensor
    keys: Tensor
    real: Tensor


@dataclass(frozen=True)
class Spans:
    """Rows and branches as sequences of any length, for attention kernels that take those.

    Attributes:
        queries: Tokens of each sequence, which lie one behind the other, int64 ``(n,)``.
        keys: Tokens that the last of them looks at: those before it, and itself, int64 ``(n,)``.
        seen: Token indices of all that is looked at, sequence by sequence, int64; None where it is the queries.
        longest: At least as many as the longest sequence has queries, and as it has keys.
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor | None
    longest: tuple[int, int]


@dataclass(frozen=True)
class Pack:
    """One block's tokens and what is read from them.

    Attributes:
        tokens: Token ids, int64 ``(T,)``.
        positions: Position of each token in its row, int64 ``(T,)``.
        groups: How attention goes, in the order of the tokens; none where there are spans.
        spans: The same for kernels that take sequences of any length; None where there are groups.
        kept: Tokens whose hidden state reaches the head, int64 ``(n,)``.
        vocabulary: Token ids that the head must score, ascending int64; None for the whole vocabulary.
        picked: Per scored token, its hidden state's place in ``kept`` and its column of the head's output.
        starts: Index into ``picked`` at which each candidate's scored tokens begin, in the order of the rows.
    """

    tokens: Tensor
    positions: Tensor
    groups: tuple[Group, ...]
    spans: Spans | None
    kept: Tensor
    vocabulary: Tensor | None
    picked: tuple[Tensor, Tensor]
    starts: np.ndarray

    def tensors(self) -> list[Tensor]:
        """All of its tensors, int64, in a fixed order."""
        return list(_tensors(self))

    def flat(self) -> Tensor:
        """All of its tensors, one behind the other."""
        return torch.cat([part.flatten() for part in self.tensors()])

    def over(self, flat: Tensor) -> Pack:
        """The same with views of what `flat` gave, wherever that is now."""
        parts = self.tensors()
        views = zip(flat.split([part.numel() for part in parts]), parts, strict=True)
        moved: Pack = _with_tensors(self, iter([view.view(part.shape) for view, part in views]))
        return moved

    def to(self, device: torch.device) -> Pack:
        """The same on a device, in one copy."""
        return self if device.type == "cpu" else self.over(onto(self.flat(), device))


def _tensors(item: Any) -> Iterator[Tensor]:
    if torch.is_tensor(item):
        yield item
    elif isinstance(item, tuple) or is_dataclass(item):
        for part in item if isinstance(item, tuple) else (getattr(item, each.name) for each in fields(item)):
            yield from _tensors(part)


def _with_tensors(item: Any, tensors: Iterator[Tensor]) -> Any:
    """The same with other tensors, in the order of `_tensors`."""
    if torch.is_tensor(item):
        return next(tensors)
    if isinstance(item, tuple):
        return tuple(_with_tensors(part, tensors) for part in item)
    if is_dataclass(item) and not isinstance(item, type):
        return replace(item, **{f.name: _with_tensors(getattr(item, f.name), tensors) for f in fields(item)})
    return item


class _Sequence(NamedTuple):
    """A prompt, or a branch of one: where its tokens lie, and those of the prompt before it."""

    start: int
    length: int
    prompt: int
    before: int


@dataclass
class _Block:
    """Tokens laid out so far, and the sequences that they are."""

    tokens: list[int] = field(default_factory=list)
    sequences: list[_Sequence] = field(default_factory=list)

    def add(self, tokens: Sequence[int], prompt: int = 0, before: int = 0) -> int:
        """Append a sequence, a branch of the ``before`` tokens from ``prompt`` on; where it begins."""
        start = len(self.tokens)
        self.tokens += tokens
        self.sequences.append(_Sequence(start, len(tokens), prompt, before))
        return start


def pack(rows: Sequence[Row], *, normalised: bool, spans: bool = False) -> Pack:
    """Lay out one block, on the CPU.

    Args:
        rows: At least one.
        normalised: Whether the whole vocabulary's logits are needed; otherwise only the candidates' are, which is
            possible when every candidate is a single token.
        spans: Say how attention goes in spans; default: in groups.
    """
    block = _Block()
    prompt_starts = _add_prompts(block, rows)
    branch_starts = _add_branches(block, rows, prompt_starts)
    laid = np.array(block.sequences)
    sources, targets, starts = _scored(rows, prompt_starts, branch_starts)
    kept, place = _distinct(sources)
    narrow = not normalised and all(row.single_token for row in rows)
    vocabulary, columns = _distinct(targets) if narrow else (None, targets)
    return Pack(
        tokens=_tensor(block.tokens),
        positions=_tensor(_positions(laid)),
        groups=() if spans else _groups(block.sequences),
        spans=_spans(laid) if spans else None,
        kept=_tensor(kept),
        vocabulary=None if vocabulary is None else _tensor(vocabulary),
        picked=(_tensor(place), _tensor(columns)),
        starts=starts,
    )


def _distinct(values: Sequence[int]) -> tuple[list[int], list[int]]:
    """The different values, ascending, and the place of each value among them."""
    found = sorted(set(values))
    places = {value: place for place, value in enumerate(found)}
    return found, [places[value] for value in values]


def _tensor(values: Sequence[int] | np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int64))


def _add_prompts(block: _Block, rows: Sequence[Row]) -> list[int]:
    """Lay out the prompts by length; where the prompt of each row begins."""
    starts = [0] * len(rows)
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].prompt)):
        starts[i] = block.add(rows[i].prompt)
    return starts


def _add_branches(block: _Block, rows: Sequence[Row], prompt_starts: Sequence[int]) -> dict[tuple[int, int], int]:
    """Lay out the candidates of several tokens by length; where candidate c of row i begins."""
    starts: dict[tuple[int, int], int] = {}
    # The last token of a branch predicts nothing that counts, so it is left out.
    branches = [
        (len(row.prompt), _padded(len(candidate.tokens) - 1), i, c)
        for i, row in enumerate(rows)
        for c, candidate in enumerate(row.candidates)
        if len(candidate.tokens) > 1
    ]
    for before, _, i, c in sorted(branches):
        starts[i, c] = block.add(rows[i].candidates[c].tokens[:-1], prompt_starts[i], before)
    return starts


def _positions(laid: np.ndarray) -> np.ndarray:
    """The position of every token in its row, where sequences ``(n, 4)`` lie one behind the other."""
    starts, lengths, _, before = laid.T
    return np.arange(lengths.sum()) - np.repeat(starts - before, lengths)


def _groups(sequences: Sequence[_Sequence]) -> tuple[Group, ...]:
    """Neighbours behind equally long prompts and of about equal length, together."""
    alike = groupby(sequences, key=lambda each: (each.before, _padded(each.length)))
    return tuple(_group(list(members), before, padded) for (before, padded), members in alike)


def _spans(laid: np.ndarray) -> Spans:
    _, queries, _, before = laid.T
    seen = None
    if before.any():
        looked_at = [np.r_[prompt : prompt + n, start : start + length] for start, length, prompt, n in laid]
        seen = _tensor(np.concatenate(looked_at))
    longest = tuple(-(-int(each.max()) // _LONGEST) * _LONGEST for each in (queries, before + queries))
    return Spans(_tensor(queries), _tensor(before + queries), seen, (longest[0], longest[1]))


def _padded(length: int) -> int:
    return -(-length // _LENGTHS) * _LENGTHS


def _group(members: Sequence[_Sequence], before: int, padded: int) -> Group:
    """A group of sequences that lie side by side, padded to a length."""
    starts, lengths = (np.array([getattr(each, name) for each in members]) for name in ("start", "length"))
    places = np.arange(padded)
    queries = starts[:, None] + np.minimum(places, lengths[:, None] - 1)
    real = np.flatnonzero(places < lengths[:, None])
    own = _tensor(queries)
    prompts = np.array([each.prompt for each in members])[:, None] + np.arange(before)
    keys = own if before == 0 else _tensor(np.concatenate([prompts, queries], axis=1))
    return Group(int(starts[0]), int(starts[0] + lengths.sum()), own, keys, _tensor(real))


def _scored(
    rows: Sequence[Row], prompt_starts: Sequence[int], branch_starts: dict[tuple[int, int], int]
) -> tuple[list[int], list[int], np.ndarray]:
    """For every scored token, the block's token that predicts it and its id; and where each candidate's begin."""
    sources: list[int] = []
    targets: list[int] = []
    starts: list[int] = []
    for i, row in enumerate(rows):
        last = prompt_starts[i] + len(row.prompt) - 1
        targets += row.targets
        if row.single_token:
            starts += range(len(sources), len(sources) + len(row.candidates))
            sources += [last] * len(row.candidates)
            continue
        for c, candidate in enumerate(row.candidates):
            starts.append(len(sources))
            branch = branch_starts.get((i, c), 0)
            sources += [last if at == 0 else branch + at - 1 for at in candidate.scored]
    return sources, targets, np.array(starts)


def cut(costs: Sequence[int], budget: int) -> Iterator[slice]:
    """Consecutive slices of the rows whose costs sum to at most ``budget``; a row that costs more goes alone."""
    start, total = 0, 0
    for i, cost in enumerate(costs):
        if i > start and total + cost > budget:
            yield slice(start, i)
            start, total = i, 0
        total += cost
    if costs:
        yield slice(start, len(costs))
