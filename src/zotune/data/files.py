"""Files of rows: indexed once, then read a row at a time, so that a large file is never in memory as objects."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Protocol

from zotune.errors import DataError, first_line

HELP = "Give a .jsonl, .json or .csv file (each also .gz), a .parquet file, or a Hugging Face data set id."

_WIDE = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks of encodings that are converted before they are read; the longer ones first."""

_LONGEST_CELL = 2**31 - 1
"""Characters; the most that Python's CSV reader takes as a limit on every system."""


class Records(Protocol):
    """Rows by number; each is read when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def read(path: Path, form: str) -> Records:
    """The rows of a file.

    Args:
        path: An existing file.
        form: ``.jsonl``, ``.json``, ``.csv`` or ``.parquet``.

    Raises:
        DataError: It cannot be read or is not what its name says. Rows that are not are found when they are read.
    """
    if form == ".parquet":
        return ParquetRows(path)
    text = TextFile.of(path)
    if form == ".csv":
        return CsvRows(text)
    return _array(text) if text.begins_with(b"[") else JsonLines(text)


@dataclass(frozen=True)
class TextFile:
    """UTF-8 text: a file that is, or a file's content after it was decompressed and converted in memory.

    Attributes:
        path: The file.
        start: First byte after the byte order mark.
        content: All bytes where they are not those of the file.
    """

    path: Path
    start: int
    content: bytes | None

    @classmethod
    def of(cls, path: Path) -> TextFile:
        """Look at the encoding; only compressed and converted files are read now.

        Raises:
            DataError: The file cannot be read, or its encoding cannot.
        """
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else None
            with cls(path, 0, content).open() as file:
                head = file.read(4)
            for mark, codec in _WIDE:
                if head.startswith(mark):
                    return cls(path, 0, (path.read_bytes() if content is None else content).decode(codec).encode())
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        text = cls(path, len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0, content)
        if 0 in head:
            raise text.undecodable(head.index(0), 0)
        return text

    def open(self, at: int | None = None) -> BinaryIO:
        """The text from byte ``at`` on; from its start by default."""
        file = self.path.open("rb") if self.content is None else io.BytesIO(self.content)
        file.seek(self.start if at is None else at)
        return file

    def lines(self, at: int) -> Iterator[str]:
        """Lines from byte ``at`` on, with their ends.

        Raises:
            DataError: A line is not UTF-8.
        """
        with self.open(at) as file:
            for raw in file:
                try:
                    yield raw.decode()
                except UnicodeDecodeError as error:
                    raise self.undecodable(at + error.start, raw[error.start]) from error
                at += len(raw)

    def begins_with(self, sign: bytes) -> bool:
        """Whether the first byte that is no space is ``sign``."""
        with self.open() as file:
            return next((line.lstrip() for line in file if not line.isspace()), b"").startswith(sign)

    def line_number(self, at: int) -> int:
        """The line that begins at byte ``at``, counted from 1."""
        with self.open(0) as file:
            return 1 + sum(file.read(min(2**20, at - done)).count(b"\n") for done in range(0, at, 2**20))

    def undecodable(self, at: int, byte: int) -> DataError:
        """What to say of a byte that is not UTF-8."""
        return DataError(
            f"{self.path} is not UTF-8 text (byte {at} is 0x{byte:02x}). Convert it from the encoding that it has, "
            f"e.g.: iconv -f LATIN1 -t UTF-8 {self.path.name} > utf8-{self.path.name}"
        )


class JsonLines:
    """One JSON object per line; blank lines are none. Eight bytes per row are kept in memory."""

    def __init__(self, text: TextFile) -> None:
        self.text, self.starts = text, array("q")
        at = text.start
        with text.open() as file:
            for line in file:
                if not line.isspace():
                    self.starts.append(at)
                at += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        at = self.starts[index]
        line = next(self.text.lines(at))
        value = _json(self.text, line.rstrip(), at)
        return _object(
            value, f"line {self.text.line_number(at)}" if not isinstance(value, dict) else "", self.text.path
        )


class CsvRows:
    """A table with a header line. Eight bytes per row are kept in memory."""

    def __init__(self, text: TextFile) -> None:
        self.text, self.starts = text, array("q")
        self._at = text.start
        cells, self.header = csv.reader(self._followed(), strict=True), list[str]()
        try:
            with _long_cells():
                while True:
                    at = self._at
                    row = next(cells, None)
                    if row is None:
                        return
                    self._add(at, row)
        except csv.Error as error:
            raise self._unreadable(cells.line_num, error) from error

    def _followed(self) -> Iterator[str]:
        """All lines, while ``_at`` is where the next one begins."""
        for line in self.text.lines(self._at):
            self._at += len(line.encode())
            yield line

    def _add(self, at: int, row: list[str]) -> None:
        if not self.header:
            self.header = row
            _require_distinct(row, self.text.path)
        elif len(row) > len(self.header):
            raise DataError(
                f"row {len(self.starts) + 1} of {self.text.path} has more cells than the header. "
                "Put quotes around text with commas."
            )
        elif row:
            self.starts.append(at)

    def _unreadable(self, line: int, error: csv.Error) -> DataError:
        path = self.text.path
        # Python's own advice is for who calls the reader.
        if "new-line character" in str(error):
            return DataError(
                f"{path} has a carriage return without a line feed outside of quotes in line {line}. If it is a part "
                "of a text, put quotes around that; if such ones end the lines, convert them, e.g.: "
                f"tr '\\r' '\\n' < {path.name} > lines-{path.name}"
            )
        return DataError(f"{path} is not CSV at line {line}: {error}.")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        with _long_cells():
            cells = next(csv.reader(self.text.lines(self.starts[index]), strict=True))
        return dict.fromkeys(self.header) | dict(zip(self.header, cells, strict=False))


@contextmanager
def _long_cells() -> Iterator[None]:
    """Let cells be as long as they are; the limit that Python's CSV reader has is the whole process's."""
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


@dataclass(frozen=True)
class Unheld:
    """Stands for a cell of a Parquet file that Python has no value for, such as a date after the year 9999.

    A row has it in the place of a value, because only a field that is used need be readable.

    Attributes:
        why: As Arrow says it.
    """

    why: str


class ParquetRows:
    """A Parquet file; one of its row groups is in memory at a time."""

    def __init__(self, path: Path) -> None:
        parquet = extra("pyarrow.parquet", f"{path} is a Parquet file")
        self.path = path
        try:
            self.file = parquet.ParquetFile(path)
            groups = range(self.file.num_row_groups)
            self.starts = [0, *accumulate(self.file.metadata.row_group(group).num_rows for group in groups)]
        # Arrow's errors derive from several of Python's, and all of them mean that this file cannot be read.
        except Exception as error:
            raise self._unreadable(error) from error
        _require_distinct(self.file.schema_arrow.names, path)
        self._group, self._table = -1, None

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect_right(self.starts, index) - 1
        try:
            if group != self._group:
                self._group, self._table = group, self.file.read_row_group(group)
            cells = self._table.slice(index - self.starts[group], 1)  # type: ignore[attr-defined]
        except Exception as error:
            raise self._unreadable(error) from error
        return {name: _held(column[0]) for name, column in zip(cells.column_names, cells.columns, strict=True)}

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"cannot read {self.path} as Parquet: {first_line(error)}")


def _held(cell: Any) -> Any:
    """What an Arrow scalar is in Python."""
    try:
        return cell.as_py()
    # As above, of several types: a year that is too late, text that is not UTF-8.
    except Exception as error:
        return Unheld(first_line(error))


def _require_distinct(columns: Sequence[str], path: Path) -> None:
    """Refuse two columns of one name; columns without a name cannot be asked for."""
    first: dict[str, int] = {}
    for number, name in enumerate(columns, start=1):
        if name and (earlier := first.setdefault(name, number)) != number:
            raise DataError(f"{path}: column {name!r} is there twice (columns {earlier} and {number}); rename one.")


def _array(text: TextFile) -> Records:
    """A JSON array of objects, which has to be read as a whole."""
    rows = _json(text, "".join(text.lines(text.start)), text.start)
    return [_object(row, f"row {number}", text.path) for number, row in enumerate(rows, start=1)]


def _json(text: TextFile, part: str, at: int) -> Any:
    """The value that a part of the text from byte ``at`` on stands for."""
    try:
        return json.loads(part)
    except (ValueError, RecursionError) as error:
        line = text.line_number(at) + (error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0)
        raise DataError(f"{text.path} is not JSON at line {line}: {error}. Write one JSON object per line.") from error


def _object(value: Any, where: str, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} of {path} is a {type(value).__name__}. Write one JSON object per line.")
    return value


def extra(module: str, reason: str) -> ModuleType:
    """A module of the extra ``datasets``.

    Raises:
        DataError: It is not installed; the message says what for, and how to get it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(f"{reason}, which needs an extra: pip install zotune[datasets]. {HELP}") from error
