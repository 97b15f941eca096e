"""Encoding: a prompt's text and the texts that may follow it become a row of tokens.

The convention is that of MeZO (Malladi et al. 2023): the prompt is stripped of surrounding spaces, and of the tokens of
``prompt + candidate`` the last ``len(tokens(prompt + candidate)) - len(tokens(prompt))`` are scored. Rows that are too
long lose tokens at the left, after the first token where that is a BOS token. What a model writes is another matter: it
begins from ``tokens(prompt)``, since tokens that merge across the border would give it the beginning of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from zotune.errors import DataError
from zotune.rows import Candidate, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """An example before tokenisation.

    Attributes:
        prompt: What comes first. Spaces at its end belong to a candidate that does not begin with one itself.
        candidates: What may follow, with the leading space if there is to be one; at least one. Spaces at the end go.
        where: Names the example in messages, e.g. ``row 3 of train.jsonl``.
    """

    prompt: str
    candidates: tuple[str, ...]
    where: str


@dataclass(frozen=True)
class Encoded:
    """Rows, and how many of them had to be cut.

    Attributes:
        rows: One per text, in order.
        cut_prompts: Rows whose prompt lost tokens at its left.
        cut_completions: Rows whose completion lost tokens at its end.
        alone: Tokens of a prompt encoded by itself, cut as its row is, by the row's number, where they differ from it.
    """

    rows: tuple[Row, ...]
    cut_prompts: int
    cut_completions: int = 0
    alone: Mapping[int, Tokens] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoder:
    """Turns texts into rows with one tokenizer, in batches.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        max_length: Most tokens of a prompt with any one of its candidates; at least 2.
        bos: What comes before the text's tokens: what the tokenizer itself puts there (``"tokenizer"``), nothing
            (``"none"``), or the token with this id. What a tokenizer appends, such as EOS, is left out always.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    bos: Literal["tokenizer", "none"] | int = "tokenizer"

    def choices(self, texts: Sequence[Text]) -> Encoded:
        """Rows for classification, where the candidates of a row compete.

        Raises:
            DataError: A prompt is empty; a candidate adds no tokens, or the same tokens as another one; or a candidate
                is too long to leave room for a token of the prompt.
        """
        head, branches = self._tokens(texts)
        rows, cut = [], 0
        for text, (body, fulls) in zip(texts, branches, strict=True):
            _require_distinct(text, fulls)
            row = _branch(text, head, body, fulls)
            # A chat's text begins with the token that is put before other texts.
            first = len(head) or int(row.prompt[0] == self.tokenizer.bos_token_id)
            fitted = fit(text.where, row, first, self.max_length, least=1)
            rows.append(fitted)
            cut += fitted is not row
        return Encoded(tuple(rows), cut_prompts=cut)

    def completions(self, texts: Sequence[Text], *, eos: bool = True) -> Encoded:
        """Rows for fine-tuning on text: one candidate each, all of its tokens scored.

        The tokenizer's EOS token, where it has one, ends each completion, so that the model learns to stop. A row that
        is too long loses its prompt first, from the left, and then the end of its completion.

        Args:
            texts: With one candidate each.
            eos: False where the completions end by themselves.

        Raises:
            DataError: A prompt or a completion is empty.
        """
        head, branches = self._tokens(texts)
        end = (int(self.tokenizer.eos_token_id),) if eos and self.tokenizer.eos_token_id is not None else ()
        room = self.max_length - max(len(head), 1)
        rows, alone, cut_prompts, cut_completions = [], {}, 0, 0
        for number, (text, (body, (full,))) in enumerate(zip(texts, branches, strict=True)):
            whole = _branch(text, head, body, [full])
            tokens = whole.candidates[0].tokens + end
            kept = tokens[:room]
            row = Row(whole.prompt, (Candidate(kept, tuple(range(len(kept)))),))
            fitted = fit(text.where, row, len(head), self.max_length)
            rows.append(fitted)
            cut_prompts += fitted is not row
            cut_completions += len(kept) < len(tokens)
            # Of one candidate as many tokens are shared as the prompt alone has, so both are cut by the same number.
            own = (*head, *body[len(row.prompt) - len(fitted.prompt) :])
            if own != fitted.prompt:
                alone[number] = own
        return Encoded(tuple(rows), cut_prompts, cut_completions, alone)

    def _tokens(self, texts: Sequence[Text]) -> tuple[Tokens, Iterator[tuple[Tokens, list[Tokens]]]]:
        """The tokens before every text, and per text the prompt's tokens and those of prompt and each candidate."""
        prompts = [text.prompt.strip(" ") for text in texts]
        bodies = self._ids(prompts)
        for text, body in zip(texts, bodies, strict=True):
            if not body:
                raise DataError(f"{text.where}: the prompt {text.prompt!r} is empty, or has no tokens.")
        joined = [
            (prompt + _spaced(text.prompt, candidate)).rstrip(" ")
            for text, prompt in zip(texts, prompts, strict=True)
            for candidate in text.candidates
        ]
        fulls = iter(self._ids(joined))
        branches = ([next(fulls) for _ in text.candidates] for text in texts)
        head = self._head(prompts, bodies)
        if len(head) >= self.max_length:
            raise DataError(
                f"data.max_length: {self.max_length} leaves no room after the tokenizer's first {len(head)}."
            )
        return head, zip(bodies, branches, strict=True)

    def _head(self, prompts: Sequence[str], bodies: Sequence[Tokens]) -> Tokens:
        """The tokens that go before every text."""
        if self.bos == "none" or not prompts:
            return ()
        if self.bos != "tokenizer":
            if not 0 <= self.bos < len(self.tokenizer):
                raise DataError(
                    f"data.bos: token id {self.bos} is outside the vocabulary (0 .. {len(self.tokenizer) - 1})."
                )
            return (self.bos,)
        whole, body = self._ids(prompts[:1], add_special_tokens=True)[0], bodies[0]
        for start in range(len(whole) - len(body) + 1):
            if whole[start : start + len(body)] == body:
                return whole[:start]
        raise DataError("cannot tell which tokens the tokenizer prepends. Set data.bos to 'none' or to a token id.")

    def _ids(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[Tokens]:
        if not texts:
            return []
        # Not verbose: the tokenizer would warn of long texts, which are cut and counted here.
        batch: Any = self.tokenizer(
            list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
        )
        return [tuple(ids) for ids in batch["input_ids"]]


def _spaced(prompt: str, candidate: str) -> str:
    """The candidate with the spaces that part it from the prompt; its own, if it has any, count."""
    stripped = prompt.rstrip(" ")
    return candidate if candidate.startswith(" ") else prompt[len(stripped) :] + candidate


def _require_distinct(text: Text, fulls: Sequence[Tokens]) -> None:
    seen: dict[Tokens, str] = {}
    for candidate, full in zip(text.candidates, fulls, strict=True):
        if full in seen:
            raise DataError(
                f"{text.where}: the candidates {seen[full]!r} and {candidate!r} have the same tokens, so the model "
                "cannot tell them apart. Choose other candidates."
            )
        seen[full] = candidate


def _branch(text: Text, head: Tokens, body: Tokens, fulls: Sequence[Tokens]) -> Row:
    """The row of one text before it is cut: the longest common prefix is shared, up to the first scored token."""
    for candidate, full in zip(text.candidates, fulls, strict=True):
        if len(full) <= len(body):
            raise DataError(
                f"{text.where}: {candidate!r} adds no tokens to the prompt {text.prompt[-40:]!r}. Give it some text, "
                "and a leading space where a word begins."
            )
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*fulls, strict=False)))
    shared = min(common, len(body))
    if not head and not shared:
        raise DataError(
            f"{text.where}: the prompt {text.prompt[-40:]!r} is one token, which merges with what follows. Begin what "
            "follows with a space, or make the prompt longer."
        )
    candidates = (Candidate(full[shared:], tuple(range(len(body) - shared, len(full) - shared))) for full in fulls)
    # Not the prompt's own tokens: at its end they may have merged with what all candidates begin with.
    return Row(head + fulls[0][:shared], tuple(candidates))


def fit(where: str, row: Row, head: int, max_length: int, least: int = 0) -> Row:
    """The row itself if it fits, else with its prompt cut after the first ``head`` tokens until it does.

    Raises:
        DataError: A candidate leaves no room for ``least`` tokens of the prompt behind these, or for any at all;
            ``where`` names the row.
    """
    excess = len(row.prompt) + max(len(candidate.tokens) for candidate in row.candidates) - max_length
    if excess <= 0:
        return row
    if len(row.prompt) - excess < max(head + least, 1):
        raise DataError(
            f"{where}: a candidate leaves no room for the prompt within {max_length} tokens. Shorten the "
            "candidates or raise data.max_length."
        )
    return Row(row.prompt[:head] + row.prompt[head + excess :], row.candidates)
