import itertools
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import contexts

from zotune.rows import Candidate, Row
from zotune.runtimes.packing import Pack, cut, pack
from zotune.testing import tiny

TOKENS = st.integers(0, 9)


@st.composite
def candidates(draw: st.DrawFn, longest: int) -> Candidate:
    tokens = draw(st.lists(TOKENS, min_size=1, max_size=longest))
    scored = draw(st.sets(st.integers(0, len(tokens) - 1), min_size=1))
    return Candidate(tuple(tokens), tuple(sorted(scored)))


@st.composite
def rows(draw: st.DrawFn, longest: int = 18) -> tuple[Row, ...]:
    prompts = st.lists(TOKENS, min_size=1, max_size=18).map(tuple)
    made = st.builds(Row, prompts, st.lists(candidates(longest), min_size=1, max_size=3).map(tuple))
    return tuple(draw(st.lists(made, min_size=1, max_size=6)))


def read(packed: Pack) -> list[tuple[int, ...]]:
    """The token ids that each token of a block sees, itself last."""
    ids = packed.tokens.tolist()
    return [tuple(ids[index] for index in seen) for seen in contexts(packed)]


def prefixes(batch: tuple[Row, ...]) -> Iterator[tuple[int, ...]]:
    """What has to be computed, from the definition of a row."""
    for row in batch:
        yield from (row.prompt[:end] for end in range(1, len(row.prompt) + 1))
        for candidate in row.candidates:
            # The last token predicts nothing that counts.
            yield from (row.prompt + candidate.tokens[:end] for end in range(1, len(candidate.tokens)))


def logit(seen: tuple[int, ...], token: int) -> int:
    """A model that anyone can run: an integer that depends on everything it may depend on."""
    return hash((seen, token)) % 1_000_003


@given(batch=rows(), normalised=st.booleans())
def test_every_token_of_every_row_is_there_once_in_its_place(batch: tuple[Row, ...], normalised: bool) -> None:
    packed = pack(batch, normalised=normalised)
    seen = read(packed)
    assert Counter(seen) == Counter(prefixes(batch))
    assert len(seen) == len(packed.tokens) == sum(row.n_tokens for row in batch)
    assert packed.positions.tolist() == [len(tokens) - 1 for tokens in seen]


@given(batch=rows(), normalised=st.booleans())
def test_kept_and_picked_point_at_the_scored_tokens(batch: tuple[Row, ...], normalised: bool) -> None:
    packed = pack(batch, normalised=normalised)
    seen = read(packed)
    columns = range(10) if packed.vocabulary is None else packed.vocabulary.tolist()
    logits = torch.tensor([[logit(seen[index], token) for token in columns] for index in packed.kept.tolist()])
    scores = np.add.reduceat(logits[packed.picked].numpy(), packed.starts)
    expected = [
        sum(logit(row.prompt + candidate.tokens[:at], candidate.tokens[at]) for at in candidate.scored)
        for row in batch
        for candidate in row.candidates
    ]
    assert scores.tolist() == expected
    assert packed.kept.tolist() == sorted(set(packed.kept.tolist()))
    assert set(packed.picked[0].tolist()) == set(range(len(packed.kept))), "a hidden state is kept for nothing"


@given(batch=rows())
def test_about_equal_lengths_are_one_group(batch: tuple[Row, ...]) -> None:
    packed = pack(batch, normalised=True)
    branches = {
        (math.ceil((len(candidate.tokens) - 1) / 16), len(row.prompt))
        for row in batch
        for candidate in row.candidates
        if len(candidate.tokens) > 1
    }
    assert len(packed.groups) == len({math.ceil(len(row.prompt) / 16) for row in batch}) + len(branches)
    assert all(group.queries.shape[1] % 16 == 0 for group in packed.groups)


@given(batch=rows(longest=1))
def test_single_tokens_cost_their_prompt_and_their_rows_of_the_head(batch: tuple[Row, ...]) -> None:
    packed = pack(batch, normalised=False)
    assert all(torch.equal(group.keys, group.queries) for group in packed.groups)
    assert len(packed.tokens) == sum(len(row.prompt) for row in batch)
    assert len(packed.kept) == len(batch)
    assert packed.vocabulary is not None
    targets = {candidate.tokens[0] for row in batch for candidate in row.candidates}
    assert packed.vocabulary.tolist() == sorted(targets)
    assert pack(batch, normalised=True).vocabulary is None


def test_one_longer_candidate_needs_the_whole_vocabulary() -> None:
    single, longer = Row((1,), (Candidate((2,), (0,)),)), Row((1,), (Candidate((2, 3), (1,)),))
    assert pack([single, longer], normalised=False).vocabulary is None


@pytest.mark.parametrize("spans", [False, True])
def test_a_pack_is_moved_with_all_of_its_tensors(spans: bool) -> None:
    packed = pack(tiny.rows("mixed", 4), normalised=False, spans=spans)
    assert all(map(torch.equal, packed.over(packed.flat()).tensors(), packed.tensors()))
    moved = packed.to(torch.device("meta")).tensors()
    assert [(each.shape, each.is_meta) for each in moved] == [(each.shape, True) for each in packed.tensors()]
    assert packed.to(torch.device("cpu")) is packed


@settings(max_examples=200)
@given(costs=st.lists(st.integers(1, 20), max_size=15), budget=st.integers(1, 40))
def test_cut_covers_the_rows_once_within_the_budget(costs: list[int], budget: int) -> None:
    parts = list(cut(costs, budget))
    assert [index for part in parts for index in range(len(costs))[part]] == list(range(len(costs)))
    for part in parts:
        assert sum(costs[part]) <= budget or part.stop - part.start == 1
    for part, following in itertools.pairwise(parts):
        assert sum(costs[part]) + costs[following.start] > budget, "a row was cut off that still had room"


@pytest.mark.parametrize(
    ("costs", "budget", "expected"),
    [([], 5, []), ([9], 5, [slice(0, 1)]), ([2, 3, 1, 9, 5], 5, [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)])],
)
def test_cut_by_hand(costs: list[int], budget: int, expected: list[slice]) -> None:
    assert list(cut(costs, budget)) == expected
