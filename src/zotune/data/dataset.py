"""The examples of a run: read, split and encoded once, ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from zotune import tasks
from zotune.config import DataConfig
from zotune.data.encode import Encoded, Encoder
from zotune.data.forms import Numbered, form
from zotune.data.sources import File, Hub, Records, locate
from zotune.data.templates import Record
from zotune.errors import ConfigError, DataError
from zotune.objectives import Objective
from zotune.rows import Example
from zotune.tasks.base import as_read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALIDATION_ROWS = 500
HELD_OUT = 0.1


@dataclass(frozen=True)
class Dataset:
    """All that a run learns from and is judged by.

    Attributes:
        train: Examples to train on.
        validation: Examples to evaluate on; none of them is among the former.
        objective: What turns scores into losses, exact for these examples.
        notices: What the user should be told: rows and class balance of each split, rows that were cut, and whether
            there are fewer rows than asked for.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    objective: Objective
    notices: tuple[str, ...]


def load(config: DataConfig, tokenizer: PreTrainedTokenizerBase, context: int) -> Dataset:
    """Read, split and encode the data of a run.

    Rows are permuted under ``split_seed`` as MeZO's official code does, so that equal sizes draw its very rows. The
    first ``train_size`` are trained on. Without a validation source, the rows that follow in the same permutation
    are the validation rows: ``validation_size`` of them, or at most 500, or 10 % where ``train_size`` is open too.

    Args:
        config: The table ``[data]``; a task's defaults fill what it leaves out.
        tokenizer: The model's.
        context: Tokens that the model can take.

    Raises:
        ConfigError: ``max_length`` or ``split_seed`` is out of range.
        DataError: A source, a template, a label or a row cannot be used as asked.
    """
    task = tasks.get(config.task) if config.task is not None else None
    if task is not None:
        config = task.complete(config)
    problem = form(config)
    encoder = Encoder(tokenizer, _max_length(config, context), config.bos)
    train_rows, validation_rows, notices = _split(config, task.prepare if task is not None else as_read)
    train = problem.examples(train_rows, encoder)
    problem.check_training(train.examples)
    validation = problem.examples(validation_rows, encoder)
    for name, part in (("train", train), ("validation", validation)):
        notices += [f"{name}: {part.summary}", *_cuts(name, part.encoded, encoder.max_length)]
    objective = problem.objective((*train.examples, *validation.examples))
    return Dataset(train.examples, validation.examples, objective, tuple(notices))


def _max_length(config: DataConfig, context: int) -> int:
    if config.max_length is not None and config.max_length > context:
        raise ConfigError(f"data.max_length: {config.max_length} is more than the model's context of {context} tokens.")
    return config.max_length or context


def _split(config: DataConfig, prepare: Callable[[Record], Record]) -> tuple[list[Numbered], list[Numbered], list[str]]:
    """The rows to train on, the rows to evaluate on, and notices of rows that were asked for and are not there."""
    if config.train is None:
        raise DataError("data.train is missing. Name a file or a data set id, or a built-in task in data.task.")
    source = locate(config.train, "train")
    other = None if config.validation is None else locate(config.validation, "validation")
    if other == source:
        raise DataError(
            f"data.train and data.validation are the same rows ({source.name}). Leave data.validation out to have rows "
            "split off for validation."
        )
    train = _permuted(source, config.split_seed, prepare)
    if other is None:
        n_train, n_validation = _sizes(len(train), config)
        validation = train[n_train : n_train + n_validation]
    else:
        n_train = config.train_size or len(train)
        validation = _permuted(other, config.split_seed, prepare)[: config.validation_size or VALIDATION_ROWS]
    train = train[:n_train]
    notices = [
        f"{name}: data.{name}_size asks for {asked} rows, but there are only {len(rows)}"
        for name, asked, rows in (
            ("train", config.train_size, train),
            ("validation", config.validation_size, validation),
        )
        if asked is not None and len(rows) < asked
    ]
    return train.rows(), validation.rows(), notices


@dataclass(frozen=True)
class _Permuted:
    """Rows of a source in the order in which they are drawn; only those that are used are ever read out."""

    name: str
    records: Records
    order: tuple[int, ...]
    prepare: Callable[[Record], Record]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, part: slice) -> _Permuted:
        return replace(self, order=self.order[part])

    def rows(self) -> list[Numbered]:
        return [(f"row {index + 1} of {self.name}", self.prepare(self.records[index])) for index in self.order]


def _permuted(source: File | Hub, seed: int, prepare: Callable[[Record], Record]) -> _Permuted:
    records = source.read()
    if not len(records):
        raise DataError(f"{source.name} has no rows.")
    if seed >= 2**32:
        raise ConfigError(f"data.split_seed: {seed} is too large; it must be below {2**32}.")
    # The legacy generator is the one that MeZO's official code draws its rows with, and it never changes.
    order = np.random.RandomState(seed).permutation(len(records))
    return _Permuted(source.name, records, tuple(order.tolist()), prepare)


def _sizes(rows: int, config: DataConfig) -> tuple[int, int]:
    """How many of one source's rows are for training and for validation."""
    if config.train_size is None:
        validation = config.validation_size or min(VALIDATION_ROWS, max(1, int(rows * HELD_OUT)))
        train = rows - validation
    else:
        train = config.train_size
        validation = min(config.validation_size or VALIDATION_ROWS, rows - train)
    if min(train, validation) < 1:
        raise DataError(
            f"{rows} rows are too few to train on {config.train_size or 'some'} and validate on "
            f"{config.validation_size or 'others'}. Lower data.train_size or data.validation_size, or give rows in "
            "data.validation."
        )
    return train, validation


def _cuts(name: str, encoded: Encoded, max_length: int) -> list[str]:
    """Notices of truncation."""
    counts = (
        ("prompts cut at the left", encoded.cut_prompts),
        ("completions cut at the end", encoded.cut_completions),
    )
    return [
        f"{name}: {count} of {len(encoded.rows)} {what}, to fit {max_length} tokens" for what, count in counts if count
    ]
