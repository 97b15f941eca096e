"""Forms of a problem: how a row read from a source becomes an example to learn from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from zotune.config import DataConfig
from zotune.data.encode import Encoded, Encoder, Text
from zotune.data.templates import Record, Template, lookup
from zotune.errors import DataError
from zotune.objectives import CandidateCrossEntropy, CompletionNLL, Objective
from zotune.rows import Example

Numbered = tuple[str, Record]
"""A row as it is read, with its name for messages, e.g. ``row 3 of train.jsonl``."""

HELP = (
    "For classification set data.candidates and data.label; for fine-tuning on text set data.completion; "
    "either with data.prompt."
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
    """

    prompt: Template
    candidates: tuple[Template, ...]
    label: str

    def examples(self, rows: Sequence[Numbered], encoder: Encoder) -> Examples:
        """Encode rows.

        Raises:
            DataError: A field is missing, a label is out of range, or a row cannot be encoded.
        """
        texts = [
            Text(self.prompt.render(row, where), tuple(each.render(row, where) for each in self.candidates), where)
            for where, row in rows
        ]
        gold = [
            _gold(lookup(row, self.label, where, "data.label"), text.candidates, where)
            for (where, row), text in zip(rows, texts, strict=True)
        ]
        encoded = encoder.choices(texts)
        examples = tuple(Example(row, index) for row, index in zip(encoded.rows, gold, strict=True))
        return Examples(examples, self._balance(gold), encoded)

    def objective(self, examples: Sequence[Example]) -> Objective:
        """The loss for these examples."""
        return CandidateCrossEntropy.for_examples(examples)

    def check_training(self, examples: Sequence[Example]) -> None:
        """Refuse training rows of one class.

        Raises:
            DataError: All rows have the same right candidate, so there is nothing to tell apart.
        """
        classes = {example.gold for example in examples}
        # Candidates with fields differ from row to row, so there the index of the right one says nothing.
        if len(classes) == 1 and not any(candidate.fields for candidate in self.candidates):
            name = self.candidates[classes.pop()].text.strip()
            raise DataError(
                f"all {len(examples)} training rows have the class {name!r}, so there is nothing to learn. Check "
                "data.label, or give training rows of each class."
            )

    def _balance(self, gold: Sequence[int]) -> str:
        counts = Counter(gold)
        shares = (
            f"{candidate.text.strip()} {100 * counts[index] / len(gold):.1f} %"
            for index, candidate in enumerate(self.candidates)
        )
        return f"{len(gold)} rows, {', '.join(shares)}"


@dataclass(frozen=True)
class Completion:
    """One text is to follow another.

    Attributes:
        prompt: Template of the prompt, which is not learnt.
        completion: Template of the text to learn.
    """

    prompt: Template
    completion: Template

    def examples(self, rows: Sequence[Numbered], encoder: Encoder) -> Examples:
        """Encode rows.

        Raises:
            DataError: A field is missing, or a row cannot be encoded.
        """
        texts = [
            Text(self.prompt.render(row, where), (self.completion.render(row, where),), where) for where, row in rows
        ]
        encoded = encoder.completions(texts)
        scored = sum(len(row.candidates[0].scored) for row in encoded.rows)
        return Examples(tuple(map(Example, encoded.rows)), f"{len(rows)} rows, {scored} tokens to learn", encoded)

    def objective(self, examples: Sequence[Example]) -> Objective:
        """The loss for these examples."""
        return CompletionNLL()

    def check_training(self, examples: Sequence[Example]) -> None:
        """Any rows will do."""


def form(config: DataConfig) -> Classification | Completion:
    """What kind of problem a configuration describes.

    Raises:
        DataError: It describes none or two, or a template cannot be read.
    """
    classification = config.candidates is not None or config.label is not None
    if classification == (config.completion is not None):
        both = "both data.completion and data.candidates or data.label are set"
        neither = "the data is given, but not what to learn from it"
        raise DataError(f"{both if classification else neither}. {HELP}")
    if config.prompt is None:
        raise DataError(f"data.prompt is missing. {HELP}")
    prompt = Template.parse("data.prompt", config.prompt)
    if config.completion is not None:
        return Completion(prompt, Template.parse("data.completion", config.completion))
    if config.candidates is None or config.label is None:
        raise DataError(f"data.{'candidates' if config.candidates is None else 'label'} is missing. {HELP}")
    if len(config.candidates) < 2:
        raise DataError(f"data.candidates has {len(config.candidates)} entries; classification needs at least 2.")
    return Classification(
        prompt, tuple(Template.parse("data.candidates", text) for text in config.candidates), config.label
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
    return names.index(text) if text in names else None


def _index(label: str | int | float) -> int | None:
    try:
        number = float(label)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None
