"""Rows: packed token sequences with the spans to score."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property


@dataclass(frozen=True)
class Candidate:
    """A continuation whose log-likelihood counts.

    Attributes:
        tokens: Token ids that follow the row's prompt; at least one.
        scored: Ascending indices into ``tokens`` whose log-probabilities are summed; at least one.
    """

    tokens: tuple[int, ...]
    scored: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """A prompt, computed once, and the candidates that branch off it.

    Attributes:
        prompt: Token ids shared by all candidates; at least one (its last token predicts each candidate's first).
        candidates: At least one.
    """

    prompt: tuple[int, ...]
    candidates: tuple[Candidate, ...]

    @cached_property
    def single_token(self) -> bool:
        """True when every candidate is one token, so that the prompt alone has to be computed."""
        return all(len(candidate.tokens) == 1 for candidate in self.candidates)

    @cached_property
    def targets(self) -> tuple[int, ...]:
        """Token ids whose log-probabilities count, candidate by candidate."""
        return tuple(candidate.tokens[at] for candidate in self.candidates for at in candidate.scored)

    @cached_property
    def n_tokens(self) -> int:
        """Tokens that a forward pass computes for this row."""
        # The last token of a branch predicts nothing that counts, so it is not computed.
        return len(self.prompt) + sum(len(candidate.tokens) - 1 for candidate in self.candidates)


@dataclass(frozen=True)
class Example:
    """A row with what the objective must know about it.

    Attributes:
        row: Its tokens.
        gold: Index of the right candidate (0 when there is one candidate, a completion).
        answers: Texts that are right when the model writes on from the prompt; empty where none are known.
        alone: Token ids of the prompt by itself, where the tokenizer merges its end with the completion in the row;
            empty where they are the row's.
    """

    row: Row
    gold: int = 0
    answers: tuple[str, ...] = ()
    alone: tuple[int, ...] = field(default=(), repr=False)

    @property
    def prompt(self) -> tuple[int, ...]:
        """What the model writes on from: unlike the row's prompt, it never has a token with text of the answer."""
        return self.alone or self.row.prompt

    def right_alone(self) -> Example:
        """The same with no candidate but the right one."""
        return replace(self, row=Row(self.row.prompt, (self.row.candidates[self.gold],)), gold=0)


def checksum(examples: Sequence[Example]) -> str:
    """CRC-32 of examples in their order, as eight hexadecimal digits."""
    known = zlib.crc32(repr(examples).encode())
    alone = [example.alone for example in examples]
    # Where all prompts are those of their rows, the checksum is what it was before they could differ.
    return f"{zlib.crc32(repr(alone).encode(), known) if any(alone) else known:08x}"
