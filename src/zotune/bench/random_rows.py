"""Rows of random tokens, as long as SST-2's, for models that have no tokenizer."""

from __future__ import annotations

import numpy as np

from zotune.data import Dataset
from zotune.objectives import CandidateCrossEntropy
from zotune.rows import Candidate, Example, Row

SHORTEST, MEAN, LONGEST = 6, 23, 64
"""Tokens of a prompt."""

_SPECIAL = 4
_ROWS = 2048


def dataset(vocabulary: int) -> Dataset:
    """Always the same examples: prompts of `SHORTEST` to `LONGEST` tokens, two candidates of one token.

    Args:
        vocabulary: Token ids are smaller.
    """
    draw = np.random.default_rng(0)
    candidates = (Candidate((vocabulary // 3,), (0,)), Candidate((vocabulary // 2,), (0,)))
    lengths = np.clip(np.round(SHORTEST + draw.gamma(3.0, (MEAN - SHORTEST) / 3.0, _ROWS)), SHORTEST, LONGEST)
    examples = tuple(
        Example(Row(tuple(draw.integers(_SPECIAL, vocabulary, int(length)).tolist()), candidates), index % 2)
        for index, length in enumerate(lengths)
    )
    return Dataset(examples, (), CandidateCrossEntropy.for_examples(examples), (), decode=str)
