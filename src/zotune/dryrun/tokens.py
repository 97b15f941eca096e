"""Rows as their tokens, for people: what the model reads, and which tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zotune.rows import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BETWEEN = "│"
SCORED = ("⟦", "⟧")
LONGEST = 160
"""Tokens of a row that are shown; of a longer one the middle is left out."""


@dataclass(frozen=True)
class TokenRow:
    """A row as texts of its tokens.

    Attributes:
        prompt: One text per token.
        candidates: Per candidate, one text and whether it is scored per token.
        gold: Index of the right candidate.
    """

    prompt: tuple[str, ...]
    candidates: tuple[tuple[tuple[str, bool], ...], ...]
    gold: int

    @classmethod
    def of(cls, example: Example, tokenizer: PreTrainedTokenizerBase) -> TokenRow:
        """The texts of an example's tokens, special ones included."""
        prompt = list(example.row.prompt)
        candidates = []
        for candidate in example.row.candidates:
            pieces = _pieces([prompt[-1], *candidate.tokens], tokenizer)[1:]
            scored = set(candidate.scored)
            candidates.append(tuple((piece, at in scored) for at, piece in enumerate(pieces)))
        return cls(tuple(_pieces(prompt, tokenizer)), tuple(candidates), example.gold)

    def lines(self) -> list[str]:
        """The prompt, then each candidate on a line of its own with the right one marked ``>``."""
        prompt = [BETWEEN.join(map(_visible, _shortened(self.prompt)))]
        return prompt + [
            f"  {'>' if index == self.gold else ' '} {_candidate(pieces)}"
            for index, pieces in enumerate(self.candidates)
        ]


def _candidate(pieces: Sequence[tuple[str, bool]]) -> str:
    texts = [_visible(text).join(SCORED) if scored else _visible(text) + BETWEEN for text, scored in pieces]
    return "".join(_shortened(texts))


def _shortened(texts: Sequence[str]) -> Sequence[str]:
    if len(texts) <= LONGEST:
        return texts
    half = LONGEST // 2
    return [*texts[:half], f" ... {len(texts) - 2 * half} tokens ... ", *texts[-half:]]


def _visible(text: str) -> str:
    """The text on one line."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token behind the one before it: some tokenizers give up a space at the beginning."""
    pieces, before = [], ""
    for at, token in enumerate(ids):
        alone = str(tokenizer.decode([token]))
        both = str(tokenizer.decode([*ids[at - 1 : at], token])) if at else alone
        pieces.append(both[len(before) :] if both.startswith(before) else alone)
        before = alone
    return pieces
