"""The examples of a run: read, split and encoded once, ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zotune import tasks
from zotune.config import DataConfig
from zotune.data import report
from zotune.data.encode import Encoded, Encoder
from zotune.data.forms import Classification, Completion, Conversations, Examples, Numbered, form
from zotune.data.split import Prepare, Split, split
from zotune.data.templates import Record, value
from zotune.errors import ConfigError, DataError, required
from zotune.figures import counted
from zotune.objectives import Objective
from zotune.rows import Example
from zotune.tasks.base import as_read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Dataset:
    """All that a run learns from and is judged by.

    Attributes:
        train: Examples to train on; where the loss is that of the right candidate alone, with no other.
        validation: Examples to evaluate on. Where both are split from one file of a user's, none is among the former.
        objective: What turns scores into losses, exact for these examples.
        notices: What the user should be told: rows and class balance of each split, rows that were cut, repeated,
            contradictory or left out, and whether there are fewer rows than asked for.
        decode: Text of token ids, without special tokens.
        stop: Token ids that end what the model writes: EOS and, as in MeZO's tasks of generation, a line break.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    objective: Objective
    notices: tuple[str, ...]
    decode: Callable[[Sequence[int]], str] = field(compare=False, repr=False)
    stop: tuple[int, ...] = ()


def load(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, context: int, embeddings: int | None = None
) -> Dataset:
    """Read, split and encode the data of a run.

    Rows are drawn as `zotune.data.split` says: ``train_size`` to train on and ``validation_size`` to evaluate on, or at
    most 500, or 10 % where ``train_size`` is open too. Where both come from one file of the user's own, a row that the
    model could not tell from a training row is not evaluated on. The rows of built-in tasks stay those of MeZO.

    Args:
        config: The table ``[data]``; a task's defaults fill what it leaves out.
        tokenizer: The model's.
        context: Tokens that the model can take.
        embeddings: Tokens that the model has embeddings of; None where the data is not for a model to read.

    Raises:
        ConfigError: ``max_length`` or ``split_seed`` is out of range.
        DataError: A source, a template, a label or a row cannot be used as asked, or the tokenizer gives a token that
            the model has no embedding of.
    """
    required(config, DataConfig, "take Config.data, or DataConfig(train=..., ...)")
    task = tasks.get(config.task) if config.task is not None else None
    if task is not None:
        config = task.complete(config)
    problem = form(config)
    encoder = Encoder(tokenizer, _max_length(config, context), config.bos)
    parts = split(config, _prepare(config, task.prepare if task is not None else as_read))
    train_rows = parts.train.rows()
    train = problem.examples(train_rows, encoder)
    problem.check_training(train.examples)
    validation_rows, validation, left_out = _held_out(parts, problem, encoder, train.examples, apart=task is None)
    learnt = problem.learnt(train.examples)
    if embeddings is not None:
        rows = [*train_rows, *validation_rows]
        _require_embedded(rows, (*learnt, *validation.examples), tokenizer, config.bos, embeddings)
    notices = _missing(config, len(train_rows), len(validation_rows))
    for name, part in (("train", train), ("validation", validation)):
        notices += [f"{name}: {part.summary}", *_cuts(name, part.encoded, encoder.max_length)]
        notices += report.repeats(name, part.examples)
    notices += left_out
    examples = (*train.examples, *validation.examples)
    notices += report.contradictions(examples, (where for where, _ in (*train_rows, *validation_rows)))
    if isinstance(problem, Classification):
        notices += report.balance(problem.classes, train.examples, validation.examples)
    return Dataset(
        learnt,
        validation.examples,
        problem.objective(examples),
        tuple(notices),
        lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)),
        _stop(tokenizer),
    )


def _stop(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return (*end, *tokenizer.encode("\n", add_special_tokens=False)[-1:])


def _max_length(config: DataConfig, context: int) -> int:
    if config.max_length is not None and config.max_length > context:
        raise ConfigError(f"data.max_length: {config.max_length} is more than the model's context of {context} tokens.")
    return config.max_length or context


def _prepare(config: DataConfig, then: Callable[[Record], Record]) -> Prepare:
    """Give a row the fields that the configuration names anew, and then what the task does."""
    names = config.fields or {}

    def prepare(record: Record, where: str) -> Record:
        return then({**record, **{new: value(record, old, where, "data.fields") for new, old in names.items()}})

    return prepare


def _held_out(
    parts: Split,
    problem: Classification | Completion | Conversations,
    encoder: Encoder,
    train: Sequence[Example],
    apart: bool,
) -> tuple[list[Numbered], Examples, list[str]]:
    """The rows to evaluate on, encoded, and a notice of those among them, or left out, that are training rows too."""
    known = {report.identity(example) for example in train}
    drop = apart and parts.one_source
    rows: list[Numbered] = []
    shared, at, cuts = 0, 0, 0
    while True:
        more = parts.held_out[at : at + parts.wanted - len(rows)].rows()
        rows, at = rows + more, at + len(more)
        if not rows:
            cut = f" once {cuts} prompts were cut to {encoder.max_length} tokens" if cuts else ""
            raise DataError(
                f"all {shared} rows that could be held out for validation are training rows too{cut}. Give other rows "
                "in data.validation."
            )
        found = problem.examples(rows, encoder)
        same = [report.identity(example) in known for example in found.examples]
        shared += sum(same)
        cuts += found.encoded.cut_prompts
        if not (drop and any(same)):
            break
        rows = [row for row, repeated in zip(rows, same, strict=True) if not repeated]
    if not shared:
        return rows, found, []
    what = "were left out" if drop else "stay, and make the evaluation look better than it is"
    return rows, found, [f"validation: {shared} rows that are training rows too {what}"]


def _require_embedded(
    rows: Sequence[Numbered],
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    bos: str | int,
    embeddings: int,
) -> None:
    """Refuse a token that the model has no embedding of: it would fail in the middle of a run.

    Raises:
        DataError: There is one; the message names the first row with one, or ``data.bos``.
    """
    for (where, _), example in zip(rows, examples, strict=True):
        row = example.row
        parts = (example.alone, row.prompt, *(candidate.tokens for candidate in row.candidates))
        token = max(max(tokens, default=0) for tokens in parts)
        if token >= embeddings:
            raise DataError(
                f"{'data.bos' if token == bos else where}: the token {tokenizer.convert_ids_to_tokens(token)!r} "
                f"has the id {token}, but the model has {embeddings} embeddings (ids 0 to {embeddings - 1}). Use the "
                "tokenizer that the model was trained with, or give the model embeddings of the added tokens."
            )


def _missing(config: DataConfig, train: int, validation: int) -> list[str]:
    """Notices of rows that were asked for and are not there."""
    asked = (("train", config.train_size, train), ("validation", config.validation_size, validation))
    return [
        f"{name}: data.{name}_size asks for {counted(size, 'row')}, but there are only {count}"
        for name, size, count in asked
        if size is not None and count < size
    ]


def _cuts(name: str, encoded: Encoded, max_length: int) -> list[str]:
    """Notices of truncation."""
    counts = (
        ("prompts cut at the left", encoded.cut_prompts),
        ("completions cut at the end", encoded.cut_completions),
    )
    return [
        f"{name}: {count} of {len(encoded.rows)} {what}, to fit {max_length} tokens" for what, count in counts if count
    ]
