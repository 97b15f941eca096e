"""Packing: rows become one unpadded sequence, a copy of it per probe.

A pack has K *blocks*, one per probe, each with the same T tokens: first the prompts, sorted by length, then the
candidates' branches, sorted by length. Equal lengths lie side by side, so attention is a handful of dense calls
without a mask, and an operation that differs per probe is a batched matmul over blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from zotune.rows import Row


@dataclass(frozen=True)
class PromptGroup:
    """``count`` prompts of ``length`` tokens that lie side by side from token ``start`` of a block."""

    start: int
    count: int
    length: int


@dataclass(frozen=True)
class BranchGroup:
    """Branches of equal length behind prompts of equal length.

    Attributes:
        start: First token of the branches, which lie side by side, within a block.
        count: How many.
        length: Tokens of each branch.
        prompts: Token indices of each branch's prompt within a block, int64 ``(count, prompt length)``.
    """

    start: int
    count: int
    length: int
    prompts: Tensor


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
    groups: tuple[PromptGroup | BranchGroup, ...]
    kept: Tensor
    vocabulary: Tensor | None
    picked: tuple[Tensor, Tensor]
    starts: np.ndarray


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
    prompts, prompt_starts = _add_prompts(block, rows)
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


def _add_prompts(block: _Block, rows: Sequence[Row]) -> tuple[list[PromptGroup], list[int]]:
    """Lay out the prompts by length; their groups, and where the prompt of each row begins."""
    groups = []
    starts = [0] * len(rows)
    lengths = [len(row.prompt) for row in rows]
    for length, group in groupby(sorted(range(len(rows)), key=lengths.__getitem__), key=lengths.__getitem__):
        members = list(group)
        for i in members:
            starts[i] = block.add(rows[i].prompt, 0)
        groups.append(PromptGroup(starts[members[0]], len(members), length))
    return groups, starts


def _add_branches(
    block: _Block, rows: Sequence[Row], prompt_starts: Sequence[int], tensor: Callable[[np.ndarray], Tensor]
) -> tuple[list[BranchGroup], dict[tuple[int, int], int]]:
    """Lay out the candidates of several tokens by length; their groups, and where candidate c of row i begins."""
    groups = []
    starts: dict[tuple[int, int], int] = {}
    # The last token of a branch predicts nothing that counts, so it is left out.
    branches = [
        (len(candidate.tokens) - 1, len(row.prompt), i, c)
        for i, row in enumerate(rows)
        for c, candidate in enumerate(row.candidates)
        if len(candidate.tokens) > 1
    ]
    for (length, prompt_length), group in groupby(sorted(branches), key=lambda branch: branch[:2]):
        members = [(i, c) for _, _, i, c in group]
        for i, c in members:
            starts[i, c] = block.add(rows[i].candidates[c].tokens[:-1], prompt_length)
        seen = np.array([prompt_starts[i] for i, _ in members])[:, None] + np.arange(prompt_length)
        groups.append(BranchGroup(starts[members[0]], len(members), length, tensor(seen)))
    return groups, starts


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
