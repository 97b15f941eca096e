"""Branches of a run: going back to an earlier step, and keeping what came later.

A branch is a run directory of its own, ``RUN/branches/NAME``, but for the checkpoints that it shares with the run.
Whatever puts other files in the place of a run's goes through `_put`: what is to come is written beside what there is,
one rename makes it certain, and `finish` moves it into place, by the next command if this one is killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import index
from pathlib import Path

from zotune import checkpoint
from zotune.config import Config, dump
from zotune.durable import sync
from zotune.errors import ConfigError, JournalError, unknown
from zotune.evaluate import Metrics
from zotune.figures import counted, from_json
from zotune.journal import locked
from zotune.journal.records import Contents, line, read, scan, shared
from zotune.journal.settings import changed
from zotune.paths import StrPath
from zotune.run import RunDirectory

_BRANCHES = "branches"
_NEXT = "next"
_PLAN = "plan.json"


@dataclass(frozen=True)
class Branch:
    """A state of a run that it has left.

    Attributes:
        name: Of its folder below ``RUN/branches``.
        path: That folder.
        steps: Finished steps.
        shared: How many of them the run has as well, the first ones.
        last: The newest evaluation on record; None if there is none.
    """

    name: str
    path: Path
    steps: int
    shared: int
    last: Metrics | None


def open_run(path: StrPath) -> tuple[RunDirectory, Config]:
    """An existing run and its configuration, once a change that was killed on the way is finished.

    Raises:
        JournalError: The path is no run.
    """
    finish(RunDirectory(path))
    return RunDirectory.open(path)


def rollback(path: StrPath, step: int, overrides: Sequence[str] = ()) -> Branch:
    """Go back to the state after ``step`` finished steps; what came later becomes a branch.

    Args:
        path: Run directory.
        step: Finished steps, from 0.
        overrides: Settings that hold from there on, such as ``method.lr=1e-6``; see
            `zotune.journal.settings.changed`. Without one, `zotune.resume` comes to the same steps again.

    Returns:
        The branch that keeps what there was.

    Raises:
        ConfigError: The run has not so many steps, there is nothing to go back from, or a setting cannot change.
        JournalError: The path is no run, its journal is damaged, another process is training there, or the directory
            cannot be written to.
    """
    with _opened(path) as run:
        contents = read(run.journal)
        # JSON takes no NumPy integer, as a script finds its best step with.
        step, done = index(step), len(contents.entries)
        if not 0 <= step <= done:
            have = counted(done, "finished step")
            raise ConfigError(f"{path} has {have}; --step must be from 0 to {done}, not {step}")
        if step == done and not overrides:
            raise ConfigError(f"{path} is at step {done}; give an earlier step, or a setting to change from there on")
        return _go_back(run, contents, step, overrides, "branch")


def repair(path: StrPath) -> Branch | None:
    """Go back to the last step before the damaged line of a run's journal; all that there was becomes a branch.

    Returns:
        The branch, or None if the journal is sound.

    Raises:
        JournalError: The path is no run, no step can be recovered, or see `rollback`.
    """
    with _opened(path) as run:
        contents = scan(run.journal)
        if contents.damage is None:
            return None
        return _go_back(run, contents, len(contents.entries), (), "damaged")


def switch(path: StrPath, name: str) -> Branch:
    """Go back to a branch; what the run is now becomes a branch instead.

    Raises:
        ConfigError: There is no such branch.
        JournalError: The journal of the run or of the branch is damaged, another process trains in the branch, or see
            `rollback`.
    """
    with _opened(path) as run:
        names = [folder.name for folder in _folders(run)]
        if name not in names:
            raise ConfigError(unknown("branch", name, names) if names else f"{path} has no branches")
        other = RunDirectory(run.path / _BRANCHES / name)
        # A branch is a run, so another process may train in it.
        with locked(other.journal):
            common = shared(read(run.journal), read(other.journal))
            files = {each.name: each.read_bytes() for each in _files(other)}
            return _put(run, "branch", files, common, joins=other)


def branches(path: StrPath) -> list[Branch]:
    """The branches of a run, in the order of their names.

    Raises:
        JournalError: The path is no run, or a journal cannot be read.
    """
    run, _ = open_run(path)
    return [_branch(run, folder) for folder in _folders(run)]


def finish(run: RunDirectory) -> bool:
    """Finish what a killed `rollback`, `repair` or `switch` had begun; whether there was anything."""
    pending = sorted((run.path / _BRANCHES).glob(f"*/{_NEXT}/{_PLAN}"))
    if pending:
        with _alone(run.path / _BRANCHES):
            for plan in pending:
                # Another process may have been quicker.
                if plan.is_file():
                    _move(run, plan)
    return bool(pending)


@contextmanager
def _opened(path: StrPath) -> Iterator[RunDirectory]:
    """A run that nobody else changes meanwhile."""
    try:
        run, _ = open_run(path)
        with locked(run.journal):
            yield run
    except OSError as error:
        raise JournalError(
            f"cannot write to {error.filename or path}: {error.strerror}. Nothing is lost: mend that, then run the "
            "command again."
        ) from error


def _go_back(run: RunDirectory, contents: Contents, step: int, overrides: Sequence[str], prefix: str) -> Branch:
    """Continue from what the journal says of the first ``step`` steps."""
    header = contents.header_at(step)
    config, change = changed(run.config, header, step, overrides)
    records = [*contents.records(step), *([change] if change else [])]
    files = {each.name: _until(each, step) for each in (run.metrics, run.predictions) if each.is_file()}
    files |= {run.config.name: dump(config).encode(), run.journal.name: b"".join(map(line, records))}
    return _put(run, prefix, files, step)


def _until(path: Path, step: int) -> bytes:
    """The lines of a file of metrics up to ``step``, without those that a crash has damaged."""
    kept = []
    for text in path.read_bytes().splitlines(keepends=True):
        with suppress(ValueError, KeyError, TypeError):
            if from_json(text)["step"] <= step:
                kept.append(text)
    return b"".join(kept)


def _put(
    run: RunDirectory, prefix: str, files: Mapping[str, bytes], step: int, joins: RunDirectory | None = None
) -> Branch:
    """Make a branch of what the run is, and put files in the place of its own.

    Args:
        run: Whose journal is locked.
        prefix: Of the branch's name.
        files: Contents by name; the journal among them.
        step: Checkpoints of later steps go to the branch.
        joins: A branch that gives its checkpoints to the run and is no more.
    """
    folder = _free(run, prefix)
    plan = {
        "leave": _checkpoints(run, after=step),
        "join": [] if joins is None else _checkpoints(joins),
        "branch": None if joins is None else joins.path.name,
    }
    draft = run.path / ".branch.part"
    shutil.rmtree(draft, ignore_errors=True)
    (draft / _NEXT).mkdir(parents=True)
    (draft / run.checkpoints.name).mkdir()
    for each in _files(run):
        shutil.copyfile(each, draft / each.name)
    for name, content in files.items():
        (draft / _NEXT / name).write_bytes(content)
    (draft / _NEXT / _PLAN).write_text(json.dumps(plan) + "\n")
    for each in (*draft.rglob("*"), draft):
        sync(each)
    folder.parent.mkdir(exist_ok=True)
    os.replace(draft, folder)
    sync(folder.parent)
    finish(run)
    return _branch(run, folder)


def _move(run: RunDirectory, plan: Path) -> None:
    """Carry out a plan; each of its moves is made once, however often the process is killed in between."""
    what, folder = json.loads(plan.read_text()), plan.parent.parent
    left = folder / run.checkpoints.name
    for name in what["leave"]:
        if not (left / name).exists():
            os.replace(run.checkpoints / name, left / name)
    if what["branch"] is not None:
        joining = RunDirectory(folder.with_name(what["branch"]))
        run.checkpoints.mkdir(exist_ok=True)
        for name in what["join"]:
            if (joining.checkpoints / name).exists():
                # Where the run came to a step again, both have its state.
                shutil.rmtree(run.checkpoints / name, ignore_errors=True)
                os.replace(joining.checkpoints / name, run.checkpoints / name)
        for each in _files(joining):
            each.unlink()
        for emptied in (joining.checkpoints, joining.path):
            # A user may have put something there.
            with suppress(OSError):
                emptied.rmdir()
    # The journal comes last: until it is there, the run has not gone back.
    for each in (run.predictions, run.metrics, run.config, run.journal):
        if (plan.parent / each.name).exists():
            os.replace(plan.parent / each.name, each)
    for each in (run.path, run.checkpoints, left):
        if each.is_dir():
            sync(each)
    plan.unlink()
    plan.parent.rmdir()


def _branch(run: RunDirectory, folder: Path) -> Branch:
    other = RunDirectory(folder)
    contents = scan(other.journal)
    known = other.evaluations(upto=len(contents.entries))
    common = shared(scan(run.journal), contents)
    return Branch(folder.name, folder, len(contents.entries), common, known[max(known)] if known else None)


def _free(run: RunDirectory, prefix: str) -> Path:
    """A folder for a new branch."""
    number = 1
    while (folder := run.path / _BRANCHES / f"{prefix}-{number}").exists():
        number += 1
    return folder


def _folders(run: RunDirectory) -> list[Path]:
    return sorted(journal.parent for journal in (run.path / _BRANCHES).glob(f"*/{run.journal.name}"))


def _files(run: RunDirectory) -> list[Path]:
    """What a branch has of its own, besides checkpoints."""
    return [each for each in (run.config, run.journal, run.metrics, run.predictions) if each.is_file()]


def _checkpoints(run: RunDirectory, after: int = -1) -> list[str]:
    """The names of the checkpoints of later steps than this."""
    steps = checkpoint.steps(run.checkpoints)
    return [checkpoint.path_of(run.checkpoints, step).name for step in steps if step > after]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process finishes what was begun in this folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
