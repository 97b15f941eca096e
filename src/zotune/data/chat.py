"""Chats: conversations become tokens through the tokenizer's chat template, and the assistant's turns are scored."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from zotune.data.conversation import Conversation, Turn, at_risk, is_known, read_tools, stranger, turns_of, with_other
from zotune.data.encode import Encoded, Text, Tokens, fit
from zotune.data.templates import require_characters
from zotune.errors import DataError, first_line
from zotune.rows import Candidate, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "the-answer-goes-here"
"""Stands for a candidate to find its place: a candidate itself may also be a part of the template's own text."""

_TODAY = datetime(2024, 7, 26)
"""What templates that write the date are told: with the true one, rows would differ from one day to the next, and a run
would find other data than it began with. Llama's own templates fall back on this day."""


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        tokenizer: A fast tokenizer that has one, perhaps with another one for conversations with tools.
    """

    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The template of this tokenizer.

        Raises:
            DataError: It has none, or cannot tell which characters a token stands for.
        """
        try:
            tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                "the model's tokenizer has no chat template. Use an instruction-tuned model, put a chat_template.jinja "
                "into the model's folder, or write the turns out with data.prompt and data.completion."
            ) from error
        if not tokenizer.is_fast:
            raise DataError("chats need a fast tokenizer; the model's folder has no tokenizer.json.")
        return cls(tokenizer)

    def encode(self, conversations: Sequence[Conversation], max_length: int) -> Encoded:
        """Rows of one candidate each: the first turns as the prompt, then all the rest, the assistant's turns scored.

        A row that is too long loses its last turns, down to the first answer; then its prompt, from the left; then the
        end of that answer.

        Raises:
            DataError: The template refuses a conversation or leaves a part of it out, the assistant says nothing in a
                turn, or it cannot be told which tokens are the assistant's.
        """
        rows, cut_prompts, cut_completions = [], 0, 0
        for each in map(self._understood, conversations):
            marks = _marks(self.tokenizer.get_chat_template(tools=each.tools))
            tokens, scored = self._marked(each) if marks else self._prefixed(each)
            if not scored or not scored[0]:
                raise DataError(
                    f"{each.where}: the chat template shows nothing that the assistant says after a prompt."
                )
            prompt, said = tokens[: scored[0]], tokens[scored[0] :]
            head = int(prompt[0] == self.tokenizer.bos_token_id)
            answer = next((n for n, at in enumerate(scored) if at != scored[0] + n), len(scored))
            kept = said[: min(max(answer, max_length - len(prompt)), max_length - max(head, 1))]
            indices = tuple(at - len(prompt) for at in scored if at - len(prompt) < len(kept))
            # What comes after the last scored token predicts nothing.
            row = Row(prompt, (Candidate(kept[: indices[-1] + 1], indices),))
            fitted = fit(each.where, row, head, max_length)
            rows.append(fitted)
            cut_prompts += fitted is not row
            cut_completions += len(indices) < len(scored)
        return Encoded(tuple(rows), cut_prompts, cut_completions)

    def begun(self, encoded: Encoded, answers: Sequence[str]) -> Encoded:
        """The same with the tokens that each answer is written on from: all before the first with text of it.

        A template may open an assistant's turn with more than it shows to a model that is to answer, such as an empty
        thought. It would be written first, and be taken for the answer.

        Args:
            encoded: Rows in whose one candidate the answer stands.
            answers: What is to be written, row by row.
        """
        alone = {}
        for number, (row, answer) in enumerate(zip(encoded.rows, answers, strict=True)):
            opening = self._opening(row.candidates[0].tokens, answer.strip())
            if opening:
                alone[number] = row.prompt + opening
        return replace(encoded, alone=alone)

    def _opening(self, tokens: Tokens, answer: str) -> Tokens:
        """The tokens before the first one of the answer's text; none where it was cut."""

        def without(start: int) -> bool:
            return answer not in self.tokenizer.decode(list(tokens[start:]), skip_special_tokens=True)

        return tokens[: max(0, bisect_left(range(len(tokens)), True, key=without) - 1)]

    def wrap(self, text: Text) -> Text:
        """The text with its prompt as the user's turn and its candidates as what the assistant's turn begins with.

        Raises:
            DataError: The template refuses the turns, or hides what the assistant says.
        """
        chat = Conversation(turns_of(text.prompt, _ANSWER), text.where)
        before, said = self._render(chat, 1, answer=True), self._render(chat)
        at = said.rfind(_ANSWER)
        if not said.startswith(before) or at < len(before):
            raise self._opaque(text.where)
        return Text(said[:at], tuple(candidate.strip() for candidate in text.candidates), text.where)

    def _understood(self, conversation: Conversation) -> Conversation:
        """The conversation with its tools where the template takes them, once nothing is sure to be lost of it.

        Raises:
            DataError: A role is unknown, the tools are none, the assistant says nothing in a turn, or the template
                leaves out a part of a message.
        """
        conversation = replace(conversation, tools=self._tools(conversation))
        template = self.tokenizer.get_chat_template(tools=conversation.tools)
        for number, turn in enumerate(conversation.turns, start=1):
            where = f"{conversation.where}, message {number}"
            if not is_known(turn) and not re.search(rf"""(['"]){re.escape(turn["role"])}\1""", template):
                raise stranger(turn, where)
            if turn["role"] == "assistant" and not turn["content"].strip() and len(turn) == 2:
                raise _silent(where)
        self._require_rendered(conversation)
        return conversation

    def _tools(self, conversation: Conversation) -> list[dict[str, Any]] | None:
        """The tools of a conversation, if the template says anything of tools."""
        if conversation.tools is None or not re.search(r"\btools\b", self.tokenizer.get_chat_template(tools=[])):
            return None
        return read_tools(conversation.tools, conversation.where) or None

    def _require_rendered(self, conversation: Conversation) -> None:
        """Refuse a message of which the template leaves out a part, which would not be learnt.

        Templates may leave out a part of one message and not of another, such as all thoughts but the last. So each
        part is looked at; messages of role and content alone, which are nearly all, have none.
        """
        parts = [(at, key) for at, turn in enumerate(conversation.turns) for key in at_risk(turn)]
        full = self._render(conversation) if parts else ""
        for at, key in parts:
            before, turn, after = conversation.turns[:at], conversation.turns[at], conversation.turns[at + 1 :]
            for others in with_other(turn, key):
                if all(self._same(replace(conversation, turns=(*before, each, *after)), full) for each in others):
                    raise DataError(
                        f"{conversation.where}, message {at + 1}: the chat template of this model's tokenizer leaves "
                        f"out {key!r} or a part of it, so it would be lost. Take it out of the messages if the model "
                        "need not see it, or use a model whose template writes it."
                    )

    def _same(self, conversation: Conversation, text: str) -> bool:
        """Whether the conversation is rendered as this text; one that the template refuses is not."""
        try:
            return self._render(conversation) == text
        except DataError:
            return False

    def _marked(self, conversation: Conversation) -> tuple[Tokens, tuple[int, ...]]:
        """All tokens and the indices of those that the template marks as the assistant's."""
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        out: Any = self._apply(conversation, conversation.turns, **options)
        mask = out["assistant_masks"]
        runs = sum(now and not before for before, now in zip([0, *mask], mask, strict=False))
        if runs < sum(turn["role"] == "assistant" for turn in conversation.turns):
            raise DataError(
                f"{conversation.where}: the tokens of a turn of the assistant cannot be found. Is it empty?"
            )
        return tuple(out["input_ids"]), tuple(at for at, own in enumerate(mask) if own)

    def _prefixed(self, conversation: Conversation) -> tuple[Tokens, tuple[int, ...]]:
        """The same where the template has no marks: each turn is what the text gains by it."""
        where = conversation.where
        full = self._render(conversation)
        require_characters(full, f"{where}: its text")
        spans = []
        for number, turn in enumerate(conversation.turns):
            if turn["role"] == "assistant":
                before = self._render(conversation, number, answer=True)
                said = self._render(conversation, number + 1)
                if not said.startswith(before) or not full.startswith(said):
                    raise self._opaque(where)
                end = self._end(said, len(before))
                if not said[len(before) : end].removesuffix(self._eos).strip():
                    raise _silent(f"{where}, message {number + 1}")
                spans.append((len(before), end))
        out: Any = self.tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        scored = tuple(
            at
            for at, (start, stop) in enumerate(out["offset_mapping"])
            if any(start < end and stop > begin for begin, end in spans)
        )
        return tuple(out["input_ids"]), scored

    def _end(self, said: str, begin: int) -> int:
        """Where a turn ends: with its EOS token, where a model stops; white space after that is the template's."""
        at = said.rfind(self._eos, begin) if self._eos else -1
        end = at + len(self._eos)
        return len(said) if at < 0 or said[end:].strip() else end

    @property
    def _eos(self) -> str:
        return str(self.tokenizer.eos_token or "")

    def _render(self, conversation: Conversation, count: int | None = None, answer: bool = False) -> str:
        """Text of the first ``count`` turns, with what opens the assistant's next turn if they are to ``answer``."""
        return str(self._apply(conversation, conversation.turns[:count], tokenize=False, add_generation_prompt=answer))

    def _apply(self, conversation: Conversation, turns: Sequence[Turn], **options: Any) -> Any:
        """What the tokenizer makes of these turns of the conversation."""
        try:
            template = _dated(self.tokenizer.get_chat_template(tools=conversation.tools))
            return self.tokenizer.apply_chat_template(
                list(turns), tools=conversation.tools, chat_template=template, **options
            )
        # Templates are programs of their own: they raise what Jinja and they themselves like.
        except Exception as error:
            raise DataError(
                f"{conversation.where}: the chat template refuses the conversation: {first_line(error)}"
            ) from error

    def _opaque(self, where: str) -> DataError:
        return DataError(
            f"{where}: cannot tell where the assistant's turn begins, because the chat template changes what came "
            "before it (some leave out earlier thoughts). Put {% generation %} marks around the assistant's turns in "
            "the template, or write the turns out with data.prompt and data.completion."
        )


@cache
def _dated(template: str) -> str:
    """A template that takes every day for `_TODAY`: a macro of its own stands in for transformers' function."""
    if "strftime_now" not in template:
        return template
    directives = sorted(set(re.findall(r"%-?[aAbBcdeFHIjmMpSTuUVwWxXyY]", template)))
    written = "".join(f"|replace('{each}', '{_TODAY.strftime(each)}')" for each in directives)
    # The empty text keeps a line's end that the template may begin with.
    return "{% macro strftime_now(format) %}{{ format" + written + " }}{% endmacro %}{{ '' }}" + template


@cache
def _marks(template: str) -> bool:
    """Whether a template itself marks what the assistant says."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _silent(where: str) -> DataError:
    return DataError(f"{where}: the assistant says nothing, so only to stop would be learnt. Leave the row out.")
