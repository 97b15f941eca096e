"""Packing: rows become one unpadded sequence, a copy of it per probe.

A pack has K *blocks*, one per probe, each with the same T tokens: first the prompts, sorted by length, then the
candidates' branches, sorted by length. Equal lengths lie side by side, so attention is a handful of dense calls
without a mask, and an operation that differs per probe is a batched matmul over blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


def pack(rows: Sequence[Row], *, normalised: bool, device: torch.device | str = "cpu") -> Pack:
    """Lay out one block.

    Args:
        rows: At least one.
        normalised: Whether the whole vocabulary's logits are needed; otherwise only the candidates' are, which is
            possible when every candidate is a single token.
        device: Where the tensors go.
    """
    tokens: list[int] = []
    positions: list[int] = []
    prompt_starts = [0] * len(rows)
    groups: list[PromptGroup | BranchGroup] = []

    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    for length, members in groupby(by_length, key=lambda i: len(rows[i].prompt)):
        start = len(tokens)
        for i in members:
            prompt_starts[i] = len(tokens)
            tokens += rows[i].prompt
            positions += range(length)
        groups.append(PromptGroup(start, (len(tokens) - start) // length, length))

    # The last token of a branch predicts nothing that counts, so it is left out.
    branches = [(i, c) for i, row in enumerate(rows) for c, cand in enumerate(row.candidates) if len(cand.tokens) > 1]
    shape = {(i, c): (len(rows[i].candidates[c].tokens) - 1, len(rows[i].prompt)) for i, c in branches}
    branch_starts: dict[tuple[int, int], int] = {}
    for (length, prompt_length), group in groupby(sorted(branches, key=shape.__getitem__), key=shape.__getitem__):
        start, members = len(tokens), list(group)
        for i, c in members:
            branch_starts[i, c] = len(tokens)
            tokens += rows[i].candidates[c].tokens[:-1]
            positions += range(prompt_length, prompt_length + length)
        prompts = torch.tensor([prompt_starts[i] for i, _ in members]).unsqueeze(1) + torch.arange(prompt_length)
        groups.append(BranchGroup(start, len(members), length, prompts.to(device)))

    sources, targets, starts = _scored(rows, prompt_starts, branch_starts)
    kept, place = np.unique(sources, return_inverse=True)
    vocabulary = None if normalised or not all(row.single_token for row in rows) else np.unique(targets)
    columns = targets if vocabulary is None else np.searchsorted(vocabulary, targets)

    def tensor(values: Sequence[int] | np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(device)

    return Pack(
        tokens=tensor(tokens),
        positions=tensor(positions),
        groups=tuple(groups),
        kept=tensor(kept),
        vocabulary=None if vocabulary is None else tensor(vocabulary),
        picked=(tensor(place), tensor(columns)),
        starts=starts,
    )


def _scored(
    rows: Sequence[Row], prompt_starts: Sequence[int], branch_starts: dict[tuple[int, int], int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per scored token of every candidate: the block's token that predicts it, and its id; and where candidates start."""
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
