"""Chats: conversations become tokens through the tokenizer's chat template, and the assistant's turns are scored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zotune.data.encode import Encoded, Text, Tokens, fit
from zotune.data.files import first_line
from zotune.data.templates import Record, named, require_characters, value
from zotune.errors import DataError, unknown
from zotune.rows import Candidate, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, str]
"""A message: its role and its content."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANSWER = "the-answer-goes-here"
"""Stands for a candidate to find its place: a candidate itself may also be a part of the template's own text."""

_HELP = "A conversation is a list of {role, content}, whose roles are system, user and assistant."


@dataclass(frozen=True)
class Conversation:
    """What was said, and the name of its row for messages."""

    turns: tuple[Turn, ...]
    where: str

    @classmethod
    def read(cls, record: Record, field: str, where: str) -> Conversation:
        """The conversation in a field of a row: ``role`` and ``content``, or ShareGPT's ``from`` and ``value``.

        Raises:
            DataError: The field is not there or holds no conversation, the conversation is empty, begins with the
                assistant or has no turn of theirs, or a role is unknown or its content is not text.
        """
        found = value(record, field, where, "data.messages")
        where = f"{where}: the field {field!r}"
        if not isinstance(found, list | tuple):
            raise DataError(f"{where} holds {named(found)}. {_HELP}")
        turns = tuple(_turn(message, f"{where}, message {number}") for number, message in enumerate(found, start=1))
        spoken = [turn["role"] for turn in turns]
        if not turns:
            raise DataError(f"{where} holds an empty conversation. Leave the row out. {_HELP}")
        if "assistant" not in spoken:
            raise DataError(f"{where} has no turn of the assistant, so there is nothing to learn.")
        if spoken[0] == "assistant":
            raise DataError(f"{where} begins with the assistant's turn, so there is nothing to answer.")
        return cls(turns, where)


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {named(message)}. {_HELP}")
    names = ("from", "value") if "role" not in message and "from" in message else ("role", "content")
    for name in names:
        if name not in message:
            raise DataError(f"{where} has no {name!r}. {_HELP}")
        if not isinstance(message[name], str):
            raise DataError(f"{where}: its {name!r} holds {named(message[name])}, not text. {_HELP}")
        require_characters(message[name], f"{where}: its {name!r}")
    role, content = (message[name] for name in names)
    role = _SHAREGPT.get(role, role) if names[0] == "from" else role
    if role not in ROLES:
        raise DataError(f"{where}: {unknown('role', role, ROLES)}")
    return {"role": role, "content": content}


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        tokenizer: A fast tokenizer that has one.
        marked: Whether the template itself marks what the assistant says, with ``{% generation %}``.
    """

    tokenizer: PreTrainedTokenizerBase
    marked: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The template of this tokenizer.

        Raises:
            DataError: It has none, or cannot tell which characters a token stands for.
        """
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                "the model's tokenizer has no chat template. Use an instruction-tuned model, put a chat_template.jinja "
                "into the model's folder, or write the turns out with data.prompt and data.completion."
            ) from error
        if not tokenizer.is_fast:
            raise DataError("chats need a fast tokenizer; the model's folder has no tokenizer.json.")
        return cls(tokenizer, bool(_GENERATION.search(template)))

    def encode(self, conversations: Sequence[Conversation], max_length: int) -> Encoded:
        """Rows of one candidate each: the first turns as the prompt, then all the rest, the assistant's turns scored.

        A row that is too long loses its last turns, down to the first answer; then its prompt, from the left; then the
        end of that answer.

        Raises:
            DataError: The template refuses a conversation, or it cannot be told which tokens are the assistant's.
        """
        rows, cut_prompts, cut_completions = [], 0, 0
        for each in conversations:
            tokens, scored = self._marked(each) if self.marked else self._prefixed(each)
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

    def wrap(self, text: Text) -> Text:
        """The text with its prompt as the user's turn and its candidates as what the assistant's turn begins with.

        Raises:
            DataError: The template refuses the turns, or hides what the assistant says.
        """
        turns = turns_of(text.prompt, _ANSWER)
        before, said = self._render(turns[:1], text.where, answer=True), self._render(turns, text.where)
        at = said.rfind(_ANSWER)
        if not said.startswith(before) or at < len(before):
            raise self._opaque(text.where)
        return Text(said[:at], tuple(candidate.strip() for candidate in text.candidates), text.where)

    def _marked(self, conversation: Conversation) -> tuple[Tokens, tuple[int, ...]]:
        """All tokens and the indices of those that the template marks as the assistant's."""
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        out: Any = self._apply(conversation.turns, conversation.where, **options)
        mask = out["assistant_masks"]
        runs = sum(now and not before for before, now in zip([0, *mask], mask, strict=False))
        if runs < sum(turn["role"] == "assistant" for turn in conversation.turns):
            raise DataError(
                f"{conversation.where}: the tokens of a turn of the assistant cannot be found. Is it empty?"
            )
        return tuple(out["input_ids"]), tuple(at for at, own in enumerate(mask) if own)

    def _prefixed(self, conversation: Conversation) -> tuple[Tokens, tuple[int, ...]]:
        """The same where the template has no marks: each turn is what the text gains by it."""
        turns, where = conversation.turns, conversation.where
        full = self._render(turns, where)
        spans = []
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before = self._render(turns[:number], where, answer=True)
                said = self._render(turns[: number + 1], where)
                if not said.startswith(before) or not full.startswith(said):
                    raise self._opaque(where)
                spans.append((len(before), self._end(said, len(before))))
        out: Any = self.tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        scored = tuple(
            at
            for at, (start, stop) in enumerate(out["offset_mapping"])
            if any(start < end and stop > begin for begin, end in spans)
        )
        return tuple(out["input_ids"]), scored

    def _end(self, said: str, begin: int) -> int:
        """Where a turn ends: with its EOS token, where a model stops; white space after that is the template's."""
        eos = str(self.tokenizer.eos_token or "")
        at = said.rfind(eos, begin) if eos else -1
        return len(said) if at < 0 or said[at + len(eos) :].strip() else at + len(eos)

    def _render(self, turns: Sequence[Turn], where: str, answer: bool = False) -> str:
        """Text of the turns, with what opens the assistant's next turn if they are to ``answer``."""
        return str(self._apply(turns, where, tokenize=False, add_generation_prompt=answer))

    def _apply(self, turns: Sequence[Turn], where: str, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(turns), **options)
        # Templates are programs of their own: they raise what Jinja and they themselves like.
        except Exception as error:
            raise DataError(f"{where}: the chat template refuses the conversation: {first_line(error)}") from error

    def _opaque(self, where: str) -> DataError:
        return DataError(
            f"{where}: cannot tell where the assistant's turn begins, because the chat template changes what came "
            "before it (some leave out earlier thoughts). Put {% generation %} marks around the assistant's turns in "
            "the template, or write the turns out with data.prompt and data.completion."
        )


def turns_of(prompt: str, answer: str) -> tuple[Turn, Turn]:
    """A user's turn and the assistant's."""
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
