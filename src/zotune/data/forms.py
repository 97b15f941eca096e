"""Forms of a problem: how a row read from a source becomes an example to learn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from zotune.config import DataConfig
from zotune.data.chat import ChatTemplate
from zotune.data.conversation import Conversation, turns_of
from zotune.data.encode import Encoded, Encoder, Text
from zotune.data.templates import Record, Template, lookup, texts
from zotune.errors import DataError
from zotune.figures import counted, percent
from zotune.objectives import CandidateCrossEntropy, CompletionNLL, Objective
from zotune.rows import Example

Numbered = tuple[str, Record]
"""A row as it is read, with its name for messages, e.g. ``row 3 of train.jsonl``."""

HELP = (
    "For classification set data.candidates and data.label; for fine-tuning on text set data.completion; "
    "either with data.prompt. For conversations set data.messages alone."
)


@dataclass(frozen=True)
class Examples:
    """The examples of a split and what is worth telling of them, e.g. ``1000 rows, terrible 44.1 %, great 55.9 %``."""

    examples: tuple[Example, ...]
    summary: str
    encoded: Encoded


@dataclass(frozen=True)
class Classification:
    """One of several candidates is right.

    Attributes:
        prompt: Template of the prompt.
        candidates: Templates of the continuations, in the order of the labels; they may have fields too.
        label: Field with the index of the right candidate, or with its text.
        loss: ``candidates``: cross-entropy over them; ``gold``: negative log-likelihood of the right one alone.
        chat: Whether prompt and candidates are turns of the user and the assistant.
    """

    prompt: Template
    candidates: tuple[Template, ...]
    label: str
    loss: Literal["candidates", "gold"]
    chat: bool

    @property
    def classes(self) -> tuple[str, ...]:
        """The candidates' texts; empty where they differ from row to row, so that an index says nothing."""
        fixed = not any(candidate.fields for candidate in self.candidates)
        return tuple(candidate.text.strip() for candidate in self.candidates) if fixed else ()

    def examples(self, rows: Sequence[Numbered], encoder: Encoder) -> Examples:
        """Encode rows.

        Raises:
            DataError: A field is missing, a label is out of range, or a row cannot be encoded.
        """
        filled = [
            Text(self.prompt.render(row, where), tuple(each.render(row, where) for each in self.candidates), where)
            for where, row in rows
        ]
        gold = [
            _gold(lookup(row, self.label, where, "data.label"), text.candidates, where)
            for (where, row), text in zip(rows, filled, strict=True)
        ]
        if self.chat:
            template = ChatTemplate.of(encoder.tokenizer)
            filled, encoder = [template.wrap(text) for text in filled], replace(encoder, bos="none")
        encoded = encoder.choices(filled)
        examples = tuple(Example(row, index) for row, index in zip(encoded.rows, gold, strict=True))
        return Examples(examples, self._balance(gold), encoded)

    def objective(self, examples: Sequence[Example]) -> Objective:
        """The loss for these examples."""
        return CompletionNLL() if self.loss == "gold" else CandidateCrossEntropy.for_examples(examples)

    def learnt(self, examples: Sequence[Example]) -> tuple[Example, ...]:
        """What of these examples is trained on: where the right candidate alone counts, no other is computed."""
        return tuple(example.right_alone() if self.loss == "gold" else example for example in examples)

    def check_training(self, examples: Sequence[Example]) -> None:
        """Refuse training rows of one class.

        Raises:
            DataError: All rows have the same right candidate, so there is nothing to tell apart.
        """
        classes = {example.gold for example in examples}
        if len(classes) == 1 and self.classes:
            name = self.classes[classes.pop()]
            raise DataError(
                f"all training rows ({len(examples)}) have the class {name!r}, so there is nothing to learn. Check "
                "data.label, or give training rows of each class."
            )

    def _balance(self, gold: Sequence[int]) -> str:
        counts = Counter(gold)
        shares = (
            f"{candidate.text.strip()} {percent(counts[index] / len(gold))}"
            for index, candidate in enumerate(self.candidates)
        )
        return f"{counted(len(gold), 'row')}, {', '.join(shares)}"


class _Learnt:
    """Text is learnt token by token."""

    def objective(self, examples: Sequence[Example]) -> Objective:
        """The loss for these examples."""
        return CompletionNLL()

    def learnt(self, examples: Sequence[Example]) -> tuple[Example, ...]:
        """All of these examples; nothing is written from them, so what a prompt is by itself does not count."""
        return tuple(replace(example, alone=()) for example in examples)

    def check_training(self, examples: Sequence[Example]) -> None:
        """Any rows will do."""


@dataclass(frozen=True)
class Completion(_Learnt):
    """One text is to follow another.

    Attributes:
        prompt: Template of the prompt, which is not learnt.
        completion: Template of the text to learn.
        answers: Field with the texts that are right in evaluation, if there are several.
        chat: Whether prompt and completion are turns of the user and the assistant.
    """

    prompt: Template
    completion: Template
    answers: str | None
    chat: bool

    def examples(self, rows: Sequence[Numbered], encoder: Encoder) -> Examples:
        """Encode rows.

        Raises:
            DataError: A field is missing, a row cannot be encoded, or its answer could not be written.
        """
        filled = [(self.prompt.render(row, where), self.completion.render(row, where), where) for where, row in rows]
        if self.chat:
            chats = [Conversation(turns_of(prompt, text), where) for prompt, text, where in filled]
            template = ChatTemplate.of(encoder.tokenizer)
            encoded = template.encode(chats, encoder.max_length)
            if self.answers is not None:
                encoded = template.begun(encoded, [text for _, text, _ in filled])
        else:
            if self.answers is not None:
                _require_a_line(filled)
            # A line break that the template itself ends in is the end, as in MeZO's tasks of generation.
            eos = not self.completion.text.endswith("\n")
            encoded = encoder.completions([Text(prompt, (text,), where) for prompt, text, where in filled], eos=eos)
        return _completed(encoded, [self._answers(row, where) for where, row in rows])

    def _answers(self, row: Record, where: str) -> tuple[str, ...]:
        return () if self.answers is None else texts(row, self.answers, where, "data.answers")


@dataclass(frozen=True)
class Conversations(_Learnt):
    """What the assistant says in a conversation, in each of their turns.

    Attributes:
        field: Field with the messages.
    """

    field: str

    def examples(self, rows: Sequence[Numbered], encoder: Encoder) -> Examples:
        """Encode rows.

        Raises:
            DataError: A field holds no conversation, or the tokenizer has no chat template that takes it.
        """
        chats = [Conversation.read(row, self.field, where) for where, row in rows]
        encoded = ChatTemplate.of(encoder.tokenizer).encode(chats, encoder.max_length)
        return _completed(encoded, [()] * len(rows))


def _completed(encoded: Encoded, answers: Sequence[tuple[str, ...]]) -> Examples:
    scored = sum(len(row.candidates[0].scored) for row in encoded.rows)
    examples = tuple(
        # Without answers to judge by, nothing is written.
        Example(row, answers=each, alone=encoded.alone.get(number, ()) if each else ())
        for number, (row, each) in enumerate(zip(encoded.rows, answers, strict=True))
    )
    return Examples(examples, f"{counted(len(examples), 'row')}, {counted(scored, 'token')} to learn", encoded)


def form(config: DataConfig) -> Classification | Completion | Conversations:
    """What kind of problem a configuration describes.

    Raises:
        DataError: It describes none or two, or a template cannot be read.
    """
    if (config.messages is not None or config.chat) and config.bos != "tokenizer":
        raise DataError("data.bos does not go with data.messages or data.chat: the chat template sets the first token.")
    if config.messages is not None:
        others = [
            name for name in ("prompt", "candidates", "label", "loss", "completion", "answers") if getattr(config, name)
        ]
        if others:
            raise DataError(f"data.messages does not go with data.{others[0]}. {HELP}")
        return Conversations(config.messages)
    classification = config.candidates is not None or config.label is not None
    if classification == (config.completion is not None):
        both = "both data.completion and data.candidates or data.label are set"
        neither = "the data is given, but not what to learn from it"
        raise DataError(f"{both if classification else neither}. {HELP}")
    if config.prompt is None:
        raise DataError(f"data.prompt is missing. {HELP}")
    prompt = Template.parse("data.prompt", config.prompt)
    if config.completion is not None:
        if config.loss is not None:
            raise DataError("data.loss is set, but it chooses the loss of data.candidates. Leave it out.")
        completion = Template.parse("data.completion", config.completion)
        return Completion(prompt, completion, config.answers, config.chat)
    if config.answers is not None:
        raise DataError(f"data.answers goes with data.completion only. {HELP}")
    if config.candidates is None or config.label is None:
        raise DataError(f"data.{'candidates' if config.candidates is None else 'label'} is missing. {HELP}")
    if len(config.candidates) < 2:
        raise DataError(f"data.candidates has only {len(config.candidates)}; classification needs at least 2.")
    candidates = tuple(Template.parse("data.candidates", text) for text in config.candidates)
    return Classification(prompt, candidates, config.label, config.loss or "candidates", config.chat)


def _require_a_line(filled: Sequence[tuple[str, str, str]]) -> None:
    """Refuse an answer to be written that begins with a line break, where writing ends."""
    for _, text, where in filled:
        if text.lstrip(" ").startswith("\n"):
            raise DataError(
                f"data.completion: {where}: it begins with a line break, where the writing of an answer ends, so "
                "that none could be right. Put the line break at the end of data.prompt."
            )


def _gold(label: str | int | float, candidates: Sequence[str], where: str) -> int:
    """Index of the right candidate.

    A number is an index, as is a truth value (false 0, true 1). Text is a candidate's text, or else an index, since CSV
    has no numbers.
    """
    names = [candidate.strip() for candidate in candidates]
    by_index, by_text = _index(label), _place(label, names)
    if not isinstance(label, str) and by_text is not None and by_text != by_index:
        raise DataError(
            f"data.label: {where}: the label {label!r} is the text of candidate {by_text}, but numbers and truth "
            "values count candidates from 0. Write the labels as text, or order the candidates so that both agree."
        )
    found = by_index if by_text is None else by_text
    if found is None or not 0 <= found < len(names):
        raise DataError(
            f"data.label: {where}: the label is {label!r}; allowed are the numbers 0 to {len(names) - 1} and the "
            f"candidates' texts: {', '.join(names)}."
        )
    return found


def _place(label: str | int | float, names: Sequence[str]) -> int | None:
    text = str(label).strip()
    if isinstance(label, bool):
        text, names = text.lower(), [name.lower() for name in names]
    if text in names:
        return names.index(text)
    # A column with gaps has 1.0 where its whole numbers are 1.
    number = _number(label)
    return next((place for place, name in enumerate(names) if number is not None and _number(name) == number), None)


def _index(label: str | int | float) -> int | None:
    number = _number(label)
    return int(number) if number is not None and number.is_integer() else None


def _number(label: str | int | float) -> float | None:
    try:
        return float(label)
    except (ValueError, OverflowError):
        return None
