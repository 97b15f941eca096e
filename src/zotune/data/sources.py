"""Sources: rows from a file or from the Hugging Face hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from zotune.errors import DataError

Records = Sequence[Mapping[str, Any]]

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
HELP = "Give a .jsonl, .json or .csv file (each also .gz), a .parquet file, or a Hugging Face data set id."
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:/]+){0,2}")


@dataclass(frozen=True)
class File:
    """A file of rows.

    Attributes:
        path: Where it is, absolute.
    """

    path: Path

    @property
    def name(self) -> str:
        """For messages."""
        return self.path.name

    def read(self) -> Records:
        """All rows, in order.

        Raises:
            DataError: It is missing, cannot be read, is not what its name says, or holds something else than rows.
        """
        path = self.path
        if path.is_dir():
            raise DataError(f"{path} is a folder. {HELP}")
        if not path.exists():
            raise DataError(f"the data file {path} does not exist. {HELP}")
        if _format(path) == ".parquet":
            return _parquet(path)
        text = _text(path)
        if _format(path) == ".csv":
            return _csv(path, text)
        return _json_array(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)


@dataclass(frozen=True)
class Hub:
    """A split of a data set on the Hugging Face hub.

    Attributes:
        dataset: Its id, e.g. ``stanfordnlp/sst2``.
        config: Its configuration, for data sets that have several.
        split: The split's name, e.g. ``train``.
    """

    dataset: str
    config: str | None
    split: str

    @property
    def name(self) -> str:
        """For messages."""
        return ":".join(part for part in (self.dataset, self.config, self.split) if part)

    def read(self) -> Records:
        """All rows, in order; downloaded and cached by ``datasets``.

        Raises:
            DataError: The extra ``datasets`` is not installed, or the data set cannot be had.
        """
        datasets = _extra("datasets", f"{self.dataset!r} is no data file, so it is taken as a Hugging Face data set id")
        try:
            return cast(Records, datasets.load_dataset(self.dataset, self.config, split=self.split))
        # What is raised depends on the versions of several libraries below, and all of it means the same to the user.
        except Exception as error:
            raise DataError(
                f"cannot get the data set {self.name!r} from the Hugging Face hub: {_first_line(error)}. Check the id "
                f"(owner/name, owner/name:split or owner/name:configuration:split) and the network. {HELP}"
            ) from error


def locate(source: str, split: str) -> File | Hub:
    """What a data source in the configuration means.

    Args:
        source: A file, or a data set id with an optional split, or configuration and split, after colons.
        split: The split of a data set whose id does not name one.

    Raises:
        DataError: It can be neither.
    """
    path = Path(source).expanduser()
    if _format(path) in FORMATS or path.is_dir():
        return File(path.absolute())
    if path.exists():
        raise DataError(f"{path} is not in a known format. {HELP}")
    if not HUB_ID.fullmatch(source):
        raise DataError(f"{source!r} is neither a file nor a data set id. {HELP}")
    dataset, *rest = source.split(":")
    return Hub(dataset, rest[0] if len(rest) == 2 else None, rest[-1] if rest else split)


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix.lower() == ".gz":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}). Convert it to UTF-8.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _json_lines(path: Path, text: str) -> Records:
    records = []
    # Not splitlines: it also splits at characters that JSON allows within a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            records.append(_json_object(path, f"line {number}", _json(path, line, number)))
    return records


def _json_array(path: Path, text: str) -> Records:
    return [_json_object(path, f"row {number}", row) for number, row in enumerate(_json(path, text, 1), start=1)]


def _json(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        line = first_line + (error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0)
        raise DataError(f"{path} is not JSON at line {line}: {error}. Write one JSON object per line.") from error


def _json_object(path: Path, where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} of {path} is a {type(value).__name__}. Write one JSON object per line.")
    return value


def _csv(path: Path, text: str) -> Records:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        records = list(reader)
    except csv.Error as error:
        raise DataError(f"{path} is not CSV after line {reader.line_num}: {error}.") from error
    for number, record in enumerate(records, start=1):
        if None in record:
            raise DataError(
                f"row {number} of {path} has more cells than the header. Put quotes around text with commas."
            )
    return records


def _parquet(path: Path) -> Records:
    parquet = _extra("pyarrow.parquet", f"{path} is a Parquet file")
    try:
        return cast(Records, parquet.read_table(path).to_pylist())
    # Arrow's errors derive from several of Python's, and all of them mean that this file cannot be read.
    except Exception as error:
        raise DataError(f"cannot read {path} as Parquet: {_first_line(error)}") from error


def _extra(module: str, reason: str) -> ModuleType:
    """A module of the extra ``datasets``, or the way to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(f"{reason}, which needs an extra: pip install zotune[datasets]. {HELP}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
