"""The journal: one checksummed line per step, from which base weights become the weights of any step.

The first line is the header. A record is written whole before its update is applied, handed to the operating system
at once and synced to disk at least once a second while records come.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from zotune.errors import JournalError

VERSION = 1
_SYNC_SECONDS = 1.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class Header:
    """What a run is; a journal is only ever continued or replayed where all of it matches.

    Attributes:
        seed: Of directions, rounding and batch order.
        method: The method's fields.
        steps: Length of the run, which the schedule needs.
        batch_size: Examples per step.
        model: Fingerprint of the base weights.
        layout: Fingerprint of the sites.
        data: Fingerprint of the training examples.
        fold: How updates are folded.
        version: Of the format.
    """

    seed: int
    method: dict[str, Any]
    steps: int
    batch_size: int
    model: str
    layout: str
    data: str
    fold: str
    version: int = VERSION


@dataclass(frozen=True)
class Entry:
    """One step.

    Attributes:
        step: Its number, from 0.
        losses: One per probe; not finite if the step was skipped.
        coefficients: One per direction; empty if the step was skipped.
        lr: Learning rate that was applied.
        batch: Checksum of the batch's example indices.
    """

    step: int
    losses: tuple[float, ...]
    coefficients: tuple[float, ...]
    lr: float
    batch: int


class Journal:
    """An open journal: what it held when it was opened, and a place to append.

    Attributes:
        header: The first line.
        entries: All steps so far, in order; ``entries[i].step == i``.
        dropped: Whether a torn last line was cut off on opening.
    """

    def __init__(self, path: Path, header: Header, entries: list[Entry], dropped: bool) -> None:
        self.path, self.header, self.entries, self.dropped = path, header, entries, dropped
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._synced = time.monotonic()

    @classmethod
    def create(cls, path: Path, header: Header) -> Journal:
        """A new journal with this header.

        Raises:
            FileExistsError: There is one.
        """
        with path.open("xb") as file:
            file.write(_line(asdict(header)))
            file.flush()
            os.fsync(file.fileno())
        return cls(path, header, [], dropped=False)

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Read a journal and make it ready for more; a torn last line is cut off.

        Raises:
            JournalError: It cannot be read, is of another version, or a line before the last is damaged.
        """
        header, entries, size = read(path)
        dropped = path.stat().st_size > size
        if dropped:
            os.truncate(path, size)
        return cls(path, header, entries, dropped)

    def append(self, entry: Entry) -> None:
        """Hand one record to the operating system, and to the disk if the last time is a second ago.

        Raises:
            ValueError: The entry is not the next step.
        """
        if entry.step != len(self.entries):
            raise ValueError(f"got the entry of step {entry.step}, but the next step is {len(self.entries)}")
        record = asdict(entry)
        record["losses"] = [loss if math.isfinite(loss) else None for loss in entry.losses]
        os.write(self._file, _line(record))
        self.entries.append(entry)
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Return when all records are on disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and let the file go."""
        self.sync()
        os.close(self._file)


def read(path: Path) -> tuple[Header, list[Entry], int]:
    """Header, entries and the length in bytes of the sound part of a journal; only a torn last line is passed over.

    Raises:
        JournalError: See `Journal.open`.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise JournalError(f"cannot read the journal {path}: {error.strerror}") from error
    records = [_parse(line) for line in lines]
    if records and records[-1] is None and len(records) > 1:
        records.pop()
    if not records or None in records:
        bad = records.index(None) + 1 if records else 1
        raise JournalError(
            f"{path}: line {bad} of {len(lines)} is damaged; the {max(0, bad - 2)} steps before it can be trusted"
        )
    first, *rest = (record for record in records if record is not None)
    header = _build(path, 1, Header, first)
    if header.version != VERSION:
        raise JournalError(f"{path} is a journal of version {header.version}; this zotune reads version {VERSION}")
    entries = [_build(path, number, _entry, record) for number, record in enumerate(rest, start=2)]
    for number, entry in enumerate(entries):
        if entry.step != number:
            raise JournalError(f"{path}: line {number + 2} is step {entry.step}, but step {number} is due")
    return header, entries, sum(len(line) for line in lines[: len(records)])


def _line(record: dict[str, Any]) -> bytes:
    body = json.dumps(record, separators=(",", ":"), allow_nan=False)
    return f'{body[:-1]},"crc":"{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None if it is torn or damaged."""
    body, mark, check = line.rpartition(b',"crc":"')
    body += b"}"
    if not mark or check != f'{zlib.crc32(body):08x}"}}\n'.encode():
        return None
    record = json.loads(body)
    return record if isinstance(record, dict) else None


def _build(path: Path, number: int, make: Callable[..., _T], record: dict[str, Any]) -> _T:
    try:
        return make(**record)
    except TypeError as error:
        raise JournalError(f"{path}: line {number} does not have the fields of version {VERSION}: {error}") from error


def _entry(step: int, losses: Sequence[float | None], coefficients: Sequence[float], lr: float, batch: int) -> Entry:
    return Entry(step, tuple(math.nan if x is None else x for x in losses), tuple(coefficients), lr, batch)
