"""The journal file: a run's journal and what it is the journal of, in one compressed file.

A gzip stream of one line of JSON (`_preface`) and, from there on, the journal as it is on disk. Gzip's own checksum
covers both, and each record of the journal has its own.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zotune.config import ModelConfig
from zotune.errors import ConfigError, JournalError
from zotune.export.card import Facts
from zotune.export.recipe import Recipe
from zotune.figures import from_json
from zotune.journal import Journal

FORMAT = "zotune-journal"
VERSION = 1


def write(recipe: Recipe, file: Path) -> None:
    """Write a recipe as one file; the same recipe gives the same bytes."""
    preface = json.dumps(_preface(recipe), separators=(",", ":")).encode()
    journal = recipe.journal
    # A run that goes on adds lines, perhaps half of one, to those that the recipe knows.
    known = 1 + len(journal.changes) + len(journal.entries)
    records = journal.path.read_bytes().splitlines(keepends=True)[:known]
    file.write_bytes(gzip.compress(b"".join([preface, b"\n", *records]), mtime=0))


def _preface(recipe: Recipe) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": recipe.model.dtype,
        "trust_remote_code": recipe.model.trust_remote_code,
        "facts": asdict(recipe.facts),
    }


def read(file: Path, base: str, trust_remote_code: bool = False) -> Recipe:
    """The recipe in a file, on a base model that is given as folder or hub id.

    Args:
        file: What `write` wrote, perhaps for someone else.
        base: Folder or hub id of the base model.
        trust_remote_code: Whether to run modelling code that comes with it.

    Raises:
        JournalError: The file cannot be read, is damaged or cut short, is something else, or is of another version.
        ConfigError: The run trusted the checkpoint's code, and whoever asks for its weights has not said to.
    """
    preface, _, records = _decompress(file).partition(b"\n")
    about = _read_preface(file, preface)
    try:
        facts = Facts(**about["facts"])
        model = ModelConfig(
            path=base,
            revision=facts.revision if base == facts.base else None,
            dtype=about["dtype"],
            trust_remote_code=trust_remote_code,
        )
        trusted = about["trust_remote_code"]
    except (KeyError, TypeError, ValueError) as error:
        raise JournalError(f"{file} lacks what a journal file of version {VERSION} has: {error!r}") from error
    # A file that comes from someone else must not decide whose code is run here.
    if trusted and not trust_remote_code:
        raise ConfigError(
            f"the run behind {file} ran modelling code that comes with its checkpoint. If that of {base} is to be run, "
            "give --trust-remote-code; from Python, trust_remote_code=True"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        path.write_bytes(records)
        try:
            journal = Journal.open(path)
        except JournalError as error:
            raise JournalError(str(error).replace(str(path), str(file))) from error
    # From here on, messages are about the file and not about the copy, which is gone.
    journal.path = file
    return Recipe(model, journal, facts)


def _decompress(file: Path) -> bytes:
    try:
        return gzip.decompress(file.read_bytes())
    except gzip.BadGzipFile as error:
        raise JournalError(
            f"{file} is not a journal file, or is damaged: {error}. 'zotune export RUN --format journal --out FILE' "
            "makes one."
        ) from error
    except OSError as error:
        raise JournalError(f"cannot read the journal file {file}: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise JournalError(f"{file} is damaged or cut short: {error}. Copy it again from where it came.") from error


def _read_preface(file: Path, line: bytes) -> dict[str, Any]:
    try:
        about = from_json(line)
    except ValueError:
        about = None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise JournalError(f"{file} is compressed, but holds no journal; its first line begins {line[:40]!r}")
    if about.get("version") != VERSION:
        raise JournalError(
            f"{file} is a journal file of version {about.get('version')!r}; this zotune reads version {VERSION}. "
            "Use the zotune that made it, or a newer one."
        )
    return about
