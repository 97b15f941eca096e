"""The journal: one checksummed line per step, from which base weights become the weights of any step.

The first line is the header. A record is written whole before its update is applied, handed to the operating system
at once and synced to disk at least once a second while records come. `zotune.journal.records` has the form of the
lines.
"""

from __future__ import annotations

import fcntl
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zotune.errors import JournalError
from zotune.journal.records import CHANGEABLE, Contents, Entry, Header, change_command, differences, line, read

_SYNC_SECONDS = 1.0
_HINTS = {
    "model": "Give the very checkpoint, revision and dtype that it began with.",
    "layout": "The model's parameters in scope have other names or shapes than they had.",
    "data": "Give the training rows, and the templates and sizes in the table [data], that it began with.",
}


class Journal:
    """A journal: what it held when it was read, and a place to append.

    The file is opened for writing, and a torn last line cut off, by `claim`; until then nothing in it changes.

    Attributes:
        header: The first line.
        entries: All steps so far, in order; ``entries[i].step == i``.
        changes: Settings that were changed on the way, in order.
        dropped: Whether the last line was torn, so that it does not count.
    """

    def __init__(self, path: Path, contents: Contents) -> None:
        self.path, self.header = path, contents.header
        self.entries, self.changes = contents.entries, contents.changes
        self.dropped = contents.sound < contents.size
        self._sound, self._size, self._contents = contents.sound, contents.size, contents
        self._file: int | None = None
        self._synced = time.monotonic()

    @classmethod
    def create(cls, path: Path, header: Header) -> Journal:
        """A new journal with this header, claimed and on disk.

        Raises:
            FileExistsError: There is one.
        """
        first = line(header)
        with path.open("xb") as file:
            file.write(first)
        journal = cls(path, Contents(header, [], [], len(first), len(first), None, [zlib.crc32(first)]))
        journal.claim()
        journal.sync()
        return journal

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Read a journal; a torn last line does not count.

        Raises:
            JournalError: It cannot be read, is of another version, or a line before the last is damaged.
        """
        return cls(path, read(path))

    def claim(self) -> None:
        """Open the file to append to it, as the only one who does.

        Raises:
            JournalError: Another process writes to it, or has since it was read.
        """
        file = _lock(self.path)
        # A journal that was put in the place of this one may by chance have its size.
        if os.fstat(file).st_size != self._size or not os.path.samestat(os.fstat(file), os.stat(self.path)):
            os.close(file)
            raise JournalError(f"{self.path} has changed since it was read, so another process is training there")
        os.truncate(file, self._sound)
        self._file = file

    def header_at(self, step: int) -> Header:
        """See `zotune.journal.records.Contents.header_at`."""
        return self._contents.header_at(step)

    def identity(self, step: int) -> str | None:
        """See `zotune.journal.records.Contents.identity`."""
        return self._contents.identity(step)

    def require(self, header: Header) -> None:
        """Make sure that a run as ``header`` says may go on with this journal.

        The number of steps may differ where the schedule is constant, since no update depends on it then.

        Raises:
            JournalError: They differ; the message says in what.
        """
        run, done = self.path.parent, len(self.entries)
        for field, (began, now) in differences(self.header_at(done), header).items():
            hint = _HINTS.get(field, "Set it back, or begin another run.")
            if field in CHANGEABLE:
                hint = f"Set it back, or have it from here on: '{change_command(run, done, field, now)}', then resume."
            raise JournalError(
                f"{run} cannot go on: its {field} is not what it began with (journal: {began!r}, now: {now!r}). {hint}"
            )

    def append(self, entry: Entry) -> None:
        """Hand one record to the operating system, and to the disk if the last time is a second ago.

        Raises:
            ValueError: The entry is not the next step.
            JournalError: It cannot be written, for example because the disk is full.
        """
        if entry.step != len(self.entries):
            raise ValueError(f"got the entry of step {entry.step}, but the next step is {len(self.entries)}")
        record = line(entry)
        try:
            written = os.write(self._descriptor(), record)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        if written < len(record):
            os.truncate(self._descriptor(), self._sound)
            raise JournalError(
                f"{self.path} could take only {written} of {len(record)} bytes of a record, which is taken back; "
                "if the disk is full, free space and resume the run"
            )
        self._sound += written
        self.entries.append(entry)
        self._contents.checks.append(zlib.crc32(record, self._contents.checks[-1]))
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Return when all records are on disk.

        Raises:
            JournalError: They cannot be written there.
        """
        try:
            os.fsync(self._descriptor())
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and let the file go; errors as for `sync`."""
        try:
            self.sync()
        finally:
            os.close(self._descriptor())
            self._file = None

    def _descriptor(self) -> int:
        if self._file is None:
            raise ValueError(f"{self.path} is not open for writing; claim it first")
        return self._file


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, nobody can append to the journal at ``path``.

    Raises:
        JournalError: Another process writes to it.
    """
    file = _lock(path)
    try:
        yield
    finally:
        os.close(file)


def _lock(path: Path) -> int:
    """A descriptor of the journal, open to append, with the writer's lock."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise JournalError(f"another process is training in {path.parent}; wait for it or stop it") from None
    except OSError:
        # Some network file systems have no locks; `Journal.claim` still finds a journal that grew.
        pass
    return file


def _unwritable(path: Path, error: OSError) -> JournalError:
    return JournalError(
        f"cannot write to {path}: {error.strerror}. Its records are whole; mend that and resume the run."
    )
