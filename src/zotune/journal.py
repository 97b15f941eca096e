"""The journal: one checksummed line per step, from which base weights become the weights of any step.

The first line is the header. A record is written whole before its update is applied, handed to the operating system
at once and synced to disk at least once a second while records come.
"""

from __future__ import annotations

import fcntl
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
    """A journal: what it held when it was read, and a place to append.

    The file is opened for writing, and a torn last line cut off, by `claim`; until then nothing in it changes.

    Attributes:
        header: The first line.
        entries: All steps so far, in order; ``entries[i].step == i``.
        dropped: Whether the last line was torn, so that it does not count.
    """

    def __init__(self, path: Path, header: Header, entries: list[Entry], sound: int, size: int) -> None:
        self.path, self.header, self.entries, self.dropped = path, header, entries, sound < size
        self._sound, self._size = sound, size
        self._file: int | None = None
        self._synced = time.monotonic()

    @classmethod
    def create(cls, path: Path, header: Header) -> Journal:
        """A new journal with this header, claimed and on disk.

        Raises:
            FileExistsError: There is one.
        """
        line = _line(asdict(header))
        with path.open("xb") as file:
            file.write(line)
        journal = cls(path, header, [], len(line), len(line))
        journal.claim()
        journal.sync()
        return journal

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Read a journal; a torn last line does not count.

        Raises:
            JournalError: It cannot be read, is of another version, or a line before the last is damaged.
        """
        return cls(path, *read(path))

    def claim(self) -> None:
        """Open the file to append to it, as the only one who does.

        Raises:
            JournalError: Another process writes to it, or has since it was read.
        """
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise JournalError(f"another process is training in {self.path.parent}; wait for it or stop it") from None
        except OSError:
            # Some network file systems have no locks; what follows still finds a journal that grew.
            pass
        if os.fstat(file).st_size != self._size:
            os.close(file)
            raise JournalError(f"{self.path} has changed since it was read, so another process is training there")
        os.truncate(file, self._sound)
        self._file = file

    def require(self, header: Header) -> None:
        """Make sure that a run as ``header`` says may go on with this journal.

        The number of steps may differ where the schedule is constant, since no update depends on it then.

        Raises:
            JournalError: They differ; the message says in what.
        """
        began, now = _fields(self.header), _fields(header)
        for field in now:
            if began.get(field) != now[field]:
                raise JournalError(
                    f"{self.path.parent} cannot go on: its {field} is not what it began with "
                    f"(journal: {began.get(field)!r}, now: {now[field]!r})"
                )

    def append(self, entry: Entry) -> None:
        """Hand one record to the operating system, and to the disk if the last time is a second ago.

        Raises:
            ValueError: The entry is not the next step.
            JournalError: It cannot be written, for example because the disk is full.
        """
        if entry.step != len(self.entries):
            raise ValueError(f"got the entry of step {entry.step}, but the next step is {len(self.entries)}")
        record = asdict(entry)
        record["losses"] = [loss if math.isfinite(loss) else None for loss in entry.losses]
        line = _line(record)
        try:
            written = os.write(self._descriptor(), line)
        except OSError as error:
            raise JournalError(f"cannot write to {self.path}: {error.strerror}") from error
        if written < len(line):
            raise JournalError(f"{self.path} could take only {written} of {len(line)} bytes; is the disk full?")
        self.entries.append(entry)
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Return when all records are on disk."""
        os.fsync(self._descriptor())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and let the file go."""
        self.sync()
        os.close(self._descriptor())
        self._file = None

    def _descriptor(self) -> int:
        if self._file is None:
            raise ValueError(f"{self.path} is not open for writing; claim it first")
        return self._file


def read(path: Path) -> tuple[Header, list[Entry], int, int]:
    """Header and entries of a journal, and the lengths in bytes of its sound part and of all of it.

    Only a torn last line is passed over.

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
    if first.get("version") != VERSION:
        raise JournalError(
            f"{path} is a journal of version {first.get('version')!r}; this zotune reads version {VERSION}"
        )
    header = _build(path, 1, Header, first)
    entries = [_build(path, number, _entry, record) for number, record in enumerate(rest, start=2)]
    for number, entry in enumerate(entries):
        if entry.step != number:
            raise JournalError(f"{path}: line {number + 2} is step {entry.step}, but step {number} is due")
    lengths = [len(line) for line in lines]
    return header, entries, sum(lengths[: len(records)]), sum(lengths)


def _fields(header: Header) -> dict[str, Any]:
    """What must match for a run to go on, by name."""
    values = asdict(header)
    method = values.pop("method")
    if method.get("schedule") == "constant":
        del values["steps"]
    return {**{f"method.{name}": value for name, value in method.items()}, **values}


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
