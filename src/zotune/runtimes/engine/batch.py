"""Batches for an engine that runs sequences: a row's candidates become sequences, repeated for every probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zotune.rows import Row


@dataclass(frozen=True)
class Prepared:
    """A row as sequences: its prompt alone where every candidate is one token, else one sequence per candidate.

    Attributes:
        sequences: Token ids.
        kept: Sequence and position of every token that predicts a scored one.
        place: For every scored token, its predictor's index in ``kept``.
        tokens: Ids of the scored tokens.
        single_token: Whether every candidate is one token.
    """

    sequences: tuple[list[int], ...]
    kept: tuple[tuple[int, int], ...]
    place: tuple[int, ...]
    tokens: tuple[int, ...]
    single_token: bool

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))

    @classmethod
    def of(cls, row: Row) -> Prepared:
        """Prepare a row."""
        single = row.single_token
        # The last token of a candidate predicts nothing that counts, so it is not computed.
        sequences = [[*row.prompt, *each.tokens[:-1]] for each in row.candidates]
        kept: dict[tuple[int, int], int] = {}
        place, tokens = [], []
        for number, candidate in enumerate(row.candidates):
            for at in candidate.scored:
                predictor = (0 if single else number, len(row.prompt) + at - 1)
                place.append(kept.setdefault(predictor, len(kept)))
                tokens.append(candidate.tokens[at])
        return cls(tuple(sequences[:1] if single else sequences), tuple(kept), tuple(place), tuple(tokens), single)


@dataclass(frozen=True)
class Batch:
    """Sequences of all rows under all probes, ascending by length.

    Attributes:
        sequences: Token ids; sequences of other probes are the same lists.
        states: The probe of every token, int64 ``(tokens,)``.
        kept: Tokens whose hidden states are read, int64 ``(probes, n)``.
        place: For every scored token, which of the n predicts it, int64.
        tokens: Ids of the scored tokens, int64.
    """

    sequences: list[list[int]]
    states: np.ndarray
    kept: np.ndarray
    place: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Prepared], probes: int) -> Batch:
        """Lay rows out for so many probes."""
        own = [tokens for row in rows for tokens in row.sequences]
        lengths = np.array([len(tokens) for tokens in own])
        order = np.argsort(np.tile(lengths, probes), kind="stable")
        sizes = lengths[order % len(own)]
        starts = np.empty(len(order), dtype=np.int64)
        starts[order] = np.cumsum(sizes) - sizes
        first = np.cumsum([0, *(len(row.sequences) for row in rows)])
        sources = [
            (at + sequence, position) for row, at in zip(rows, first, strict=False) for sequence, position in row.kept
        ]
        sequence, position = np.array(sources).T
        kept_first = np.cumsum([0, *(len(row.kept) for row in rows)])
        place = [at + each for row, at in zip(rows, kept_first, strict=False) for each in row.place]
        return cls(
            [own[index] for index in (order % len(own)).tolist()],
            np.repeat(order // len(own), sizes),
            starts.reshape(probes, -1)[:, sequence] + position,
            np.array(place),
            np.array([token for row in rows for token in row.tokens]),
        )
