"""Exporting a run, and making weights of a journal file."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from zotune.errors import ConfigError, unknown
from zotune.export import adapter, journal_file, merged
from zotune.export.drafts import drafted, refuse_existing, size
from zotune.export.recipe import Recipe
from zotune.paths import StrPath, expand

FORMATS = ("merged", "peft", "journal")
SHARD_SIZE = "5GB"
MAX_ERROR = 0.01


@dataclass(frozen=True)
class Exported:
    """What came out.

    Attributes:
        path: Folder or file.
        format: One of `FORMATS`.
        steps: Steps of the run that are in it.
        bytes: Its size.
        seconds: What it took.
        rank: Of an adapter.
        error: Relative Frobenius error of an adapter; 0 if it is exact.
        notes: What else to know, a sentence or two each.
    """

    path: Path
    format: str
    steps: int
    bytes: int
    seconds: float
    rank: int | None = None
    error: float | None = None
    notes: tuple[str, ...] = ()


def export_run(
    path: StrPath,
    out: StrPath,
    format: str = "merged",
    *,
    rank: int | None = None,
    max_error: float | None = None,
    shard_size: str | None = None,
) -> Exported:
    """Write what a run has learnt after its last step.

    Args:
        path: The run directory.
        out: Folder to make, or file for the format ``journal``.
        format: ``merged``: an ordinary Hugging Face folder; ``peft``: a LoRA adapter folder; ``journal``: one small
            file that `apply_journal` makes weights of.
        rank: Of an adapter at most; default: that of the change, up to 512.
        max_error: Largest relative Frobenius error of an adapter at any site; default: 0.01.
        shard_size: Largest file of merged weights: a number above 0 with KB, MB, GB or TB; default: 5GB.

    Raises:
        ConfigError: The format is unknown or has no use for what was given, the shard size is none, ``out`` exists, or
            an adapter would be too far from the weights.
        JournalError: The path is no run, or its journal is damaged, empty or of another base model.
        ModelError: The base model cannot be loaded, or PEFT is missing.
    """
    if format not in FORMATS:
        raise ConfigError(unknown("format", format, FORMATS))
    _refuse_foreign(format, "peft", rank=rank, max_error=max_error)
    _refuse_foreign(format, "merged", shard_size=shard_size)
    if rank is not None and rank < 1:
        raise ConfigError(f"got rank = {rank}; a rank is at least 1")
    max_error = MAX_ERROR if max_error is None else max_error
    shard_size = SHARD_SIZE if shard_size is None else shard_size
    merged.require_shard_size(shard_size)
    began, out = time.perf_counter(), expand(out)
    refuse_existing(out)
    recipe = Recipe.of_run(path)
    made: adapter.Adapter | None = None
    with drafted(out, folder=format != "journal") as draft:
        if format == "merged":
            merged.write(recipe, draft, shard_size=shard_size)
        elif format == "peft":
            made = adapter.write(recipe, draft, rank=rank, max_error=max_error)
        else:
            journal_file.write(recipe, draft)
    return _outcome(out, format, recipe, began, made)


def _refuse_foreign(format: str, own: str, **given: object) -> None:
    """Refuse what was given to a format and means something to another one alone."""
    for name, value in given.items():
        if value is not None and format != own:
            raise ConfigError(f"got {name} = {value} with format = {format!r}; it belongs to {own!r}: leave it out")


def apply_journal(
    base: StrPath, file: StrPath, out: StrPath, *, shard_size: str = SHARD_SIZE, trust_remote_code: bool = False
) -> Exported:
    """Rebuild the weights of a run from its journal file, bit for bit, without data and without a forward pass.

    Args:
        base: Folder or hub id of the base model.
        file: What `export_run` wrote in the format ``journal``.
        out: Hugging Face folder to make.
        shard_size: Largest file of weights, as for `export_run`.
        trust_remote_code: Whether to run modelling code that comes with the base model; the file does not decide that.

    Raises:
        ConfigError: ``out`` exists or cannot be written, the shard size is none, or the run had such code and it is not
            trusted.
        JournalError: The file is damaged, of another version, or of another base model.
        ModelError: The base model cannot be loaded.
    """
    merged.require_shard_size(shard_size)
    began, out = time.perf_counter(), expand(out)
    refuse_existing(out)
    recipe = journal_file.read(expand(file), os.fspath(base), trust_remote_code)
    with drafted(out, folder=True) as draft:
        merged.write(recipe, draft, shard_size=shard_size)
    return _outcome(out, "merged", recipe, began)


def _outcome(out: Path, format: str, recipe: Recipe, began: float, made: adapter.Adapter | None = None) -> Exported:
    seconds = round(time.perf_counter() - began, 3)
    outcome = Exported(out, format, len(recipe.journal.entries), size(out), seconds)
    return outcome if made is None else replace(outcome, rank=made.stored, error=made.error, notes=made.notes)
