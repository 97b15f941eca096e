"""The split: which rows of the sources are trained on and which are evaluated on.

Rows are permuted under ``split_seed`` as MeZO's official code does, so that equal sizes draw its very rows. The first
are trained on; without a validation source the rows that follow in the same permutation are held out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from zotune.config import DataConfig
from zotune.data.files import Records
from zotune.data.forms import Numbered
from zotune.data.sources import File, Hub, locate
from zotune.data.templates import Record
from zotune.errors import ConfigError, DataError
from zotune.figures import counted

VALIDATION_ROWS = 500
HELD_OUT = 0.1

Prepare = Callable[[Record, str], Record]
"""Makes a row as read into one for the templates; the second argument names it."""


@dataclass(frozen=True)
class Drawn:
    """Rows of a source in the order in which they are drawn; only those that are used are ever read."""

    name: str
    records: Records
    order: np.ndarray
    prepare: Prepare

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, part: slice) -> Drawn:
        return replace(self, order=self.order[part])

    def rows(self) -> list[Numbered]:
        """The rows themselves, in this order."""
        read: dict[int, Numbered] = {}
        # In the order of the file, in which a disk and a compressed row group are read once.
        for index in sorted(self.order.tolist()):
            where = f"row {index + 1} of {self.name}"
            read[index] = where, self.prepare(self.records[index], where)
        return [read[index] for index in self.order.tolist()]


@dataclass(frozen=True)
class Split:
    """The rows to train on, and those to evaluate on: the first ``wanted`` of ``held_out`` that are fit for it.

    Attributes:
        train: Training rows.
        held_out: Rows that may be evaluated on.
        wanted: How many of them.
        one_source: Whether both come from the same rows.
    """

    train: Drawn
    held_out: Drawn
    wanted: int
    one_source: bool


def split(config: DataConfig, prepare: Prepare) -> Split:
    """Open the sources and draw from them.

    Raises:
        ConfigError: ``split_seed`` is out of range.
        DataError: A source cannot be read, has no rows or too few, or is given twice.
    """
    if config.train is None:
        raise DataError("data.train is missing. Name a file or a data set id, or a built-in task in data.task.")
    source = locate(config.train, "train")
    other = None if config.validation is None else locate(config.validation, "validation")
    if other == source:
        raise DataError(
            f"data.train and data.validation are the same rows ({source.name}). Leave data.validation out to have rows "
            "split off for validation."
        )
    drawn = _draw(source, config.split_seed, prepare)
    if other is None:
        train, wanted = _sizes(len(drawn), config)
        return Split(drawn[:train], drawn[train:], wanted, one_source=True)
    held_out = _draw(other, config.split_seed, prepare)
    return Split(drawn[: config.train_size], held_out, config.validation_size or VALIDATION_ROWS, one_source=False)


def _draw(source: File | Hub, seed: int, prepare: Prepare) -> Drawn:
    records = source.read()
    if not len(records):
        raise DataError(f"{source.name} has no rows.")
    if seed >= 2**32:
        raise ConfigError(f"data.split_seed: {seed} is too large; it must be below {2**32}.")
    # The legacy generator is the one that MeZO's official code draws its rows with, and it never changes.
    return Drawn(source.name, records, np.random.RandomState(seed).permutation(len(records)), prepare)


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
            f"{counted(rows, 'row')}: too few to train on {config.train_size or 'some'} and validate on "
            f"{config.validation_size or 'others'}. Lower data.train_size or data.validation_size, or give rows in "
            "data.validation."
        )
    return train, validation
