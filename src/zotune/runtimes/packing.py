"""Packing: rows become one unpadded sequence, a copy of it per probe.

A pack has K *blocks*, one per probe, each with the same T tokens: first the prompts, sorted by length, then the
candidates' branches. Rows of about equal length lie side by side, so attention is a handful of dense calls, and an
operation that differs per probe is a batched matmul over blocks. Only attention ever sees padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from zotune.rows import Row

ACTIVATIONS = 16
"""Vectors of the hidden width that the activations of a token take, about."""

_LENGTHS = 16
"""Attention pads lengths to multiples of this: fewer calls, and shapes that batched products are good at."""


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
class Pack:
    """One block's tokens and what is read from them.

    Attributes:
        tokens: Token ids, int64 ``(T,)``.
        positions: Position of each token in its row, int64 ``(T,)``.
        groups: How attention goes, in the order of the tokens.
        kept: Tokens whose hidden state reaches the head, int64 ``(n,)``.
        vocabulary: Token ids that the head must score, ascending int64; None for the whole vocabulary.
        picked: Per scored token, its hidden state's place in ``kept`` and its column of the head's output.
        starts: Index into ``picked`` at which each candidate's scored tokens begin, in the order of the rows.
    """

    tokens: Tensor
    positions: Tensor
    groups: tuple[Group, ...]
    kept: Tensor
    vocabulary: Tensor | None
    picked: tuple[Tensor, Tensor]
    starts: np.ndarray


_ToTensor = Callable[[Sequence[int] | np.ndarray], Tensor]


@dataclass
class _Block:
    """Tokens laid out so far."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add(self, tokens: Sequence[int], position: int) -> int:
        """Append tokens whose first has this position in its row; where they begin."""
        start = len(self.tokens)
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))
        return start


def pack(rows: Sequence[Row], *, normalised: bool, device: torch.device | str = "cpu") -> Pack:
    """Lay out one block.

    Args:
        rows: At least one.
        normalised: Whether the whole vocabulary's logits are needed; otherwise only the candidates' are, which is
            possible when every candidate is a single token.
        device: Where the tensors go.
    """

    def tensor(values: Sequence[int] | np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(device)

    block = _Block()
    prompts, prompt_starts = _add_prompts(block, rows, tensor)
    branches, branch_starts = _add_branches(block, rows, prompt_starts, tensor)
    sources, targets, starts = _scored(rows, prompt_starts, branch_starts)
    kept, place = np.unique(sources, return_inverse=True)
    narrow = not normalised and all(row.single_token for row in rows)
    vocabulary, columns = np.unique(targets, return_inverse=True) if narrow else (None, targets)
    return Pack(
        tokens=tensor(block.tokens),
        positions=tensor(block.positions),
        groups=(*prompts, *branches),
        kept=tensor(kept),
        vocabulary=None if vocabulary is None else tensor(vocabulary),
        picked=(tensor(place), tensor(columns)),
        starts=starts,
    )


def _add_prompts(block: _Block, rows: Sequence[Row], tensor: _ToTensor) -> tuple[list[Group], list[int]]:
    """Lay out the prompts by length; their groups, and where the prompt of each row begins."""
    groups = []
    starts = [0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    for padded, group in groupby(order, key=lambda i: _padded(len(rows[i].prompt))):
        members = list(group)
        for i in members:
            starts[i] = block.add(rows[i].prompt, 0)
        lengths = [len(rows[i].prompt) for i in members]
        groups.append(_group([starts[i] for i in members], lengths, padded, tensor))
    return groups, starts


def _add_branches(
    block: _Block, rows: Sequence[Row], prompt_starts: Sequence[int], tensor: _ToTensor
) -> tuple[list[Group], dict[tuple[int, int], int]]:
    """Lay out the candidates of several tokens by length; their groups, and where candidate c of row i begins."""
    groups = []
    starts: dict[tuple[int, int], int] = {}
    # The last token of a branch predicts nothing that counts, so it is left out.
    branches = [
        (len(row.prompt), _padded(len(candidate.tokens) - 1), i, c)
        for i, row in enumerate(rows)
        for c, candidate in enumerate(row.candidates)
        if len(candidate.tokens) > 1
    ]
    for (before, padded), group in groupby(sorted(branches), key=lambda branch: branch[:2]):
        members = [(i, c) for _, _, i, c in group]
        for i, c in members:
            starts[i, c] = block.add(rows[i].candidates[c].tokens[:-1], before)
        lengths = [len(rows[i].candidates[c].tokens) - 1 for i, c in members]
        prompts = np.array([prompt_starts[i] for i, _ in members])[:, None] + np.arange(before)
        groups.append(_group([starts[member] for member in members], lengths, padded, tensor, prompts))
    return groups, starts


def _padded(length: int) -> int:
    return -(-length // _LENGTHS) * _LENGTHS


def _group(
    starts: Sequence[int], lengths: Sequence[int], padded: int, tensor: _ToTensor, prompts: np.ndarray | None = None
) -> Group:
    """A group of members that begin at these tokens, side by side, behind these tokens of their prompts."""
    places = np.arange(padded)
    queries = np.array(starts)[:, None] + np.minimum(places, np.array(lengths)[:, None] - 1)
    real = np.flatnonzero(places < np.array(lengths)[:, None])
    own = tensor(queries)
    keys = own if prompts is None else tensor(np.concatenate([prompts, queries], axis=1))
    return Group(starts[0], starts[0] + sum(lengths), own, keys, tensor(real))


def _scored(
    rows: Sequence[Row], prompt_starts: Sequence[int], branch_starts: dict[tuple[int, int], int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every scored token, the block's token that predicts it and its id; and where each candidate's begin."""
    sources: list[int] = []
    targets: list[int] = []
    starts: list[int] = []
    for i, row in enumerate(rows):
        last = prompt_starts[i] + len(row.prompt) - 1
        for c, candidate in enumerate(row.candidates):
            starts.append(len(sources))
            branch = branch_starts.get((i, c), 0)
            sources += [last if at == 0 else branch + at - 1 for at in candidate.scored]
            targets += [candidate.tokens[at] for at in candidate.scored]
    return np.array(sources), np.array(targets), np.array(starts)


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
