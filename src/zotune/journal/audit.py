"""Looking into journals: whether one is sound and fits its run, and where two part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from zotune import checkpoint
from zotune.config import load
from zotune.errors import JournalError, ZotuneError
from zotune.figures import counted
from zotune.journal.branches import finish
from zotune.journal.records import Contents, Entry, differences, read, scan, shared
from zotune.journal.settings import configured
from zotune.run import RunDirectory
from zotune.schedules import factor


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        journal: The file.
        size: Its length in bytes.
        steps: Steps that can be recovered, the first ones.
        checkpoints: Steps whose checkpoints are sound, ascending.
        problems: What is wrong, one line each; none if all is well.
        notices: What is as it may be, but worth knowing.
        damaged: Whether a line after the header is, so that `zotune.journal.branches.repair` mends what is wrong.
    """

    journal: Path
    size: int
    steps: int
    checkpoints: tuple[int, ...]
    problems: tuple[str, ...]
    notices: tuple[str, ...]
    damaged: bool = False

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True)
class Difference:
    """What `diff` found.

    Attributes:
        header: Both values of every field of the headers that differs.
        steps: Finished steps of both.
        shared: How many of them, the first ones, have the same records.
        parting: The records of the first step that differs; None if one journal is the beginning of the other.
    """

    header: dict[str, tuple[Any, Any]]
    steps: tuple[int, int]
    shared: int
    parting: tuple[Entry, Entry] | None

    @property
    def same(self) -> bool:
        """Whether both are one and the same run, and equally long."""
        return not self.header and self.steps == (self.shared, self.shared)


def journal_file(path: Path) -> Path:
    """The journal of a run directory, or the file itself; an interrupted rollback is finished first."""
    if not path.is_dir():
        return path
    run = RunDirectory(path)
    finish(run)
    return run.journal


def verify(path: Path) -> Verdict:
    """Check every record of a journal; in a run directory also its configuration and checkpoints.

    Nothing is changed, and neither model nor data is loaded.

    Args:
        path: Run directory or journal file.

    Raises:
        JournalError: There is neither; a run that has lost its journal is not sound.
    """
    journal = journal_file(path)
    if not journal.exists() and not RunDirectory(path).config.exists():
        raise JournalError(f"{path} is neither a run directory nor a journal file, so there is nothing to verify")
    try:
        contents = scan(journal)
    except ZotuneError as error:
        size = journal.stat().st_size if journal.is_file() else 0
        return Verdict(journal, size, 0, (), (str(error),), ())
    steps = len(contents.entries)
    problems, notices = _learning_rates(contents), []
    damaged = contents.damage is not None and not contents.damage.torn
    if contents.damage is not None and contents.damage.torn:
        notices.append(f"the last record, in line {contents.damage.line}, is torn; its step runs again on resume")
    elif damaged:
        problems.insert(0, f"{contents.damage}; {counted(steps, 'step')} before it can be recovered")
    sound: tuple[int, ...] = ()
    if path.is_dir():
        run = RunDirectory(path)
        problems += _configuration(run, contents)
        folder = run.checkpoints
        faults = {step: checkpoint.fault(folder, step, contents.identity) for step in checkpoint.steps(folder)}
        problems += [f"the checkpoint of step {step} is {fault}" for step, fault in faults.items() if fault]
        sound = tuple(step for step, fault in faults.items() if not fault)
        notices += [f"the checkpoint of step {step} is ahead of the journal" for step in sound if step > steps]
    return Verdict(journal, contents.size, steps, sound, tuple(problems), tuple(notices), damaged)


def diff(a: Path, b: Path) -> Difference:
    """Compare two journals, given as run directories or files.

    Raises:
        JournalError: One cannot be read or is damaged.
    """
    one, other = read(journal_file(a)), read(journal_file(b))
    common = shared(one, other)
    parting = next(islice(zip(one.entries, other.entries, strict=False), common, None), None)
    header = differences(one.header, other.header)
    return Difference(header, (len(one.entries), len(other.entries)), common, parting)


def _learning_rates(contents: Contents) -> list[str]:
    """A line for the first step whose learning rate is not the one that its settings give."""
    for entry in contents.entries:
        header = contents.header_at(entry.step)
        method = header.method
        due = method["lr"] * factor(method["schedule"], entry.step, header.steps, method["warmup_steps"])
        # Another C library may round a cosine differently.
        if not math.isclose(entry.lr, due, rel_tol=1e-9):
            return [f"step {entry.step + 1} has the learning rate {entry.lr:g}, but its settings give {due:g}"]
    return []


def _configuration(run: RunDirectory, contents: Contents) -> list[str]:
    """A line per setting in which the configuration is not what the journal says."""
    header = contents.header_at(len(contents.entries))
    try:
        now = configured(header, load(run.config))
    except ZotuneError as error:
        return [str(error)]
    return [
        f"{run.config.name} has {name} = {value!r}, but the journal {began!r}"
        for name, (began, value) in differences(header, now).items()
    ]
