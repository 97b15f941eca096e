"""Rollback: an earlier step of a run, other settings from there on, and nothing lost."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
from tiny_runs import Recorder, assert_same, contents, restored, saved

import zotune
from zotune import config, journal
from zotune.config import Config
from zotune.errors import ConfigError, JournalError
from zotune.journal import Change, audit, branches
from zotune.run import RunDirectory

Configure = Callable[..., Config]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]
) -> Path:
    """A finished run of twelve steps with checkpoints after every third and evaluations after every fourth."""
    folder = tmp_path_factory.mktemp("trained")
    train = {"steps": 12, "checkpoint_every": 3, "keep_checkpoints": 9, "eval_every": 4}
    method = {"preset": "lozo-m", "lr": 1e-3, "interval": 5, "schedule": "linear"}
    configure = partial(tiny_runs.configure, folder, tiny_model_folder, sentiment_files)
    return zotune.start(configure(train=train, method=method, model={"dtype": "bfloat16"}), Recorder()).path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def records(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def test_going_back_keeps_what_came_later(run: Path, trained: Path) -> None:
    kept = zotune.rollback(run, 7)
    assert (kept.name, kept.path, kept.steps, kept.shared) == ("branch-1", run / "branches" / "branch-1", 12, 7)
    before = contents(trained)
    now = contents(run)
    whole = before["journal.jsonl"].splitlines(keepends=True)
    assert now["journal.jsonl"] == b"".join(whole[:8])
    assert now["config.toml"] == before["config.toml"]
    assert {record["step"] for record in records(run, "metrics.jsonl")} == set(range(8))
    assert [record["step"] for record in records(run, "metrics.jsonl") if record["kind"] == "eval"] == [0, 4]
    for name in ("journal.jsonl", "metrics.jsonl", "config.toml"):
        assert now[f"branches/branch-1/{name}"] == before[name]
    # Every checkpoint is where it belongs, bit for bit.
    assert set(checkpoints(run)) | set(checkpoints(kept.path)) == set(checkpoints(trained))
    assert max(checkpoints(run)) == 6
    assert min(checkpoints(kept.path)) > 7
    for name, content in before.items():
        if name.startswith("checkpoints"):
            assert content in (now.get(name), now.get(f"branches/branch-1/{name}"))


def test_going_back_leaves_out_metrics_that_a_crash_has_damaged(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        b"".join([lines[0], b'{"kind": "st\n', b"[3]\n", b'{"kind": "step"}\n', b"[" * 9999 + b"\n", *lines[1:]])
    )
    zotune.rollback(run, 7)
    assert path.read_bytes() == b"".join(line for line in lines if json.loads(line)["step"] <= 7)


@pytest.mark.parametrize("step", [0, 3, 7, 11])
def test_the_same_settings_come_to_the_same_bits(run: Path, trained: Path, step: int) -> None:
    zotune.rollback(run, step)
    assert zotune.evaluate_run(run).examples == 24
    seen = Recorder()
    zotune.resume(run, seen)
    assert [record["step"] for record in seen.steps] == list(range(step + 1, 13))
    assert (run / "journal.jsonl").read_bytes() == (trained / "journal.jsonl").read_bytes()
    assert_same(saved(run), saved(trained))
    shared = [(record["kind"], record["step"]) for record in records(trained, "metrics.jsonl")]
    assert sorted((record["kind"], record["step"]) for record in records(run, "metrics.jsonl")) >= sorted(shared)


def test_other_settings_hold_from_there_on(run: Path, trained: Path, tmp_path: Path) -> None:
    changes = ("method.lr=5e-4", "method.schedule=cosine", "method.eps=2e-3", "train.steps=14", "train.eval_every=2")
    zotune.rollback(run, 6, changes)
    now = config.load(run / "config.toml")
    assert (now.method.lr, now.train.steps, now.train.eval_every) == (5e-4, 14, 2)
    zotune.resume(run, Recorder())
    read, before = journal.read(run / "journal.jsonl"), journal.read(trained / "journal.jsonl")
    assert read.header == before.header
    assert read.changes == [
        Change(6, {"method.eps": 2e-3, "method.lr": 5e-4, "method.schedule": "cosine", "steps": 14})
    ]
    assert read.entries[:6] == before.entries[:6]
    assert len(read.entries) == 14
    assert read.entries[6].lr == 5e-4 * 0.5 * (1 + math.cos(math.pi * 6 / 14))
    zotune.plot(run)
    final = saved(run)
    assert_same(restored(run), final)
    done = zotune.replay(run, tmp_path / "out")
    assert done.comparison is not None
    assert (done.comparison.step, done.comparison.same) == (14, True)
    shutil.rmtree(run / "checkpoints")
    assert_same(restored(run), final)


def test_before_a_change_the_settings_are_those_that_held_then(run: Path, trained: Path) -> None:
    zotune.rollback(run, 6, ["method.lr=5e-4", "method.schedule=constant"])
    zotune.resume(run, Recorder())
    zotune.rollback(run, 9, ["method.lr=1e-4"])
    first = Change(6, {"method.lr": 5e-4, "method.schedule": "constant"})
    assert journal.read(run / "journal.jsonl").changes == [first, Change(9, {"method.lr": 1e-4})]
    zotune.rollback(run, 8)
    assert journal.read(run / "journal.jsonl").changes == [first]
    assert config.load(run / "config.toml").method.lr == 5e-4
    zotune.rollback(run, 4)
    assert (run / "config.toml").read_bytes() == (trained / "config.toml").read_bytes()
    zotune.resume(run, Recorder())
    assert (run / "journal.jsonl").read_bytes() == (trained / "journal.jsonl").read_bytes()
    assert_same(saved(run), saved(trained))


def test_settings_may_change_without_going_back(run: Path) -> None:
    kept = zotune.rollback(run, np.int64(12), ["train.steps=15", "method.schedule=constant"])
    assert (kept.steps, kept.shared) == (12, 12)
    assert zotune.resume(run, Recorder()).steps == 15


def test_a_branch_is_a_run_of_its_own(run: Path, trained: Path, tmp_path: Path) -> None:
    kept = zotune.rollback(run, 5)
    done = zotune.replay(kept.path, tmp_path / "out")
    assert (done.step, done.comparison.same) == (12, True)  # type: ignore[union-attr]
    zotune.plot(kept.path)
    assert_same(restored(kept.path), saved(trained))


def test_a_branch_can_be_gone_back_to(run: Path, trained: Path) -> None:
    zotune.rollback(run, 7, ["method.lr=5e-4"])
    zotune.resume(run, Recorder())
    other = contents(run)
    zotune.rollback(run, 2)
    assert [(each.name, each.steps, each.shared) for each in branches.branches(run)] == [
        ("branch-1", 12, 2),
        ("branch-2", 12, 2),
    ]
    kept = branches.switch(run, "branch-1")
    assert (kept.name, kept.steps, kept.shared) == ("branch-3", 2, 2)
    assert [each.name for each in branches.branches(run)] == ["branch-2", "branch-3"]
    for name in ("journal.jsonl", "metrics.jsonl", "config.toml"):
        assert (run / name).read_bytes() == (trained / name).read_bytes()
    assert_same(restored(run), saved(trained))
    branches.switch(run, "branch-2")
    assert {name: content for name, content in contents(run).items() if name in other}.keys() >= {"journal.jsonl"}
    assert (run / "journal.jsonl").read_bytes() == other["journal.jsonl"]
    assert_same(restored(run), saved(run))
    # The checkpoints of common steps, of before and of after the change are all its own.
    assert audit.verify(run).sound
    assert {3, 6, 9, 12} <= {*audit.verify(run).checkpoints}


def test_a_branch_whose_steps_the_run_took_again_can_be_gone_back_to(run: Path, trained: Path) -> None:
    kept = zotune.rollback(run, 5)
    zotune.resume(run, Recorder())
    before = contents(run)
    branches.switch(run, kept.name)
    assert_same(restored(run), saved(trained))
    assert audit.verify(run).sound
    assert {name for name in contents(run) if name.startswith("checkpoints")} == {
        name for name in before if name.startswith("checkpoints")
    }


def test_a_branch_in_which_another_process_trains_stays_its_own(run: Path) -> None:
    kept = zotune.rollback(run, 5)
    opened = journal.Journal.open(kept.path / "journal.jsonl")
    opened.claim()
    before = contents(run)
    with pytest.raises(JournalError, match=r"another process is training in .*branch-1"):
        branches.switch(run, kept.name)
    assert contents(run) == before
    opened.close()
    branches.switch(run, kept.name)


def test_what_a_user_put_into_a_branch_stays(run: Path) -> None:
    kept = zotune.rollback(run, 7)
    (kept.path / "notes.txt").write_text("mine")
    branches.switch(run, kept.name)
    assert (kept.path / "notes.txt").read_text() == "mine"
    assert [each.name for each in branches.branches(run)] == ["branch-2"]


class Killed(BaseException):
    """Stands for the end of the process."""


CHANGES_FILES = ("mkdir", "replace", "rename", "unlink", "rmdir", "fsync")


def kill_at(number: int, patch: pytest.MonkeyPatch) -> list[str]:
    """End the process before the change of files of this number; the list grows by every change that is made."""
    made: list[str] = []

    def counted(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(made) == number:
                raise Killed
            made.append(name)
            return change(*args, **kwargs)

        return call

    for name in CHANGES_FILES:
        # What is on disk after a power cut cannot be tried here, so that syncing would only take time.
        patch.setattr(os, name, counted(name, (lambda _: None) if name == "fsync" else getattr(os, name)))
    return made


def killed_at(number: int, patch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Make a change until the process ends."""
    with patch.context() as inner:
        kill_at(number, inner)
        change()


def visible(run: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(run).items() if not name.startswith(".")}


def damage(run: Path) -> None:
    """Flip one bit in the middle of the journal."""
    content = bytearray((run / "journal.jsonl").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "journal.jsonl").write_bytes(content)


def to_step_3(run: Path) -> None:
    zotune.rollback(run, 3, ["method.lr=5e-4"])


def to_a_branch(run: Path) -> None:
    branches.switch(run, "branch-1")


def to_what_is_sound(run: Path) -> None:
    branches.repair(run)


@pytest.mark.parametrize("change", [to_step_3, to_a_branch, to_what_is_sound])
def test_killed_at_any_moment_it_is_done_or_not_begun(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    zotune.rollback(run, 5, ["method.lr=2e-4"])
    if change is to_what_is_sound:
        damage(run)
    old = visible(run)
    reference = shutil.copytree(run, tmp_path / "reference")
    with monkeypatch.context() as patch:
        made = kill_at(10**6, patch)
        change(reference)
    new = visible(reference)
    assert new != old
    outcomes = []
    for number in range(len(made)):
        victim = shutil.copytree(run, tmp_path / "victim")
        with pytest.raises(Killed):
            killed_at(number, monkeypatch, partial(change, victim))
        assert set(old.values()) <= set(contents(victim).values()), "nothing is lost at any time"
        if branches.finish(RunDirectory(victim)):
            assert visible(victim) == new
        elif visible(victim) != new:
            assert visible(victim) == old
            change(victim)
            assert visible(victim) == new
        outcomes.append(made[number])
        shutil.rmtree(victim)
    assert {"replace", "unlink", "fsync"} <= set(outcomes)


def test_the_next_command_completes_what_was_begun(
    run: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = shutil.copytree(run, tmp_path / "reference")
    with monkeypatch.context() as patch:
        made = kill_at(10**6, patch)
        to_step_3(reference)
    # The journal is the last file that is replaced.
    with pytest.raises(Killed):
        killed_at(len(made) - 1 - made[::-1].index("replace"), monkeypatch, partial(to_step_3, run))
    assert (run / "journal.jsonl").read_bytes() == (trained / "journal.jsonl").read_bytes()
    assert zotune.resume(run, Recorder()).steps == 12
    assert journal.read(run / "journal.jsonl").changes == [Change(3, {"method.lr": 5e-4})]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("method.rank=3", "method.rank cannot change at step 7"),
        ("method.interval=3", "method.interval cannot change"),
        ("method.scope=linear", "method.scope cannot change"),
        ("method.momentum=0.5", "method.momentum cannot change"),
        ("method.directions=2", "method.directions cannot change"),
        ("method.preset=lozo", "method.preset cannot change"),
        ("train.seed=1", "train.seed cannot change"),
        ("train.batch_size=1", "train.batch_size cannot change"),
        ("runtime.fold=master", "runtime.fold cannot change"),
        ("model.path=other", "model cannot change .* Begin another run for that. These may change: method.lr, "),
        ("data.train=other.jsonl", "data cannot change"),
        ("output=elsewhere", "output cannot change"),
        ("train.steps=6", "train.steps = 6 is less than the 7 steps that stay"),
        ("method.lrr=1", "Did you mean 'method.lr'"),
        ("method.lr=-1", "method.lr: "),
        ("method.lr", "write it as section.key=value"),
    ],
)
def test_what_cannot_change_is_refused(run: Path, setting: str, expected: str) -> None:
    before = contents(run)
    with pytest.raises(ConfigError, match=expected):
        zotune.rollback(run, 7, [setting])
    assert contents(run) == before


def test_steps_that_are_not_there_are_refused(run: Path) -> None:
    before = contents(run)
    for step in (-1, 13):
        with pytest.raises(ConfigError, match="has 12 finished steps; --step must be from 0 to 12"):
            zotune.rollback(run, step)
    with pytest.raises(ConfigError, match="is at step 12; give an earlier step"):
        zotune.rollback(run, 12)
    with pytest.raises(ConfigError, match="has no branches"):
        branches.switch(run, "branch-1")
    assert contents(run) == before
    zotune.rollback(run, 7)
    with pytest.raises(ConfigError, match=r"unknown branch 'branch-2'. Did you mean 'branch-1'\?"):
        branches.switch(run, "branch-2")


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for change in (partial(zotune.rollback, step=1), branches.branches, branches.repair):
        with pytest.raises(JournalError, match="is not a run directory"):
            change(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_trains_is_left_alone(run: Path) -> None:
    opened = journal.Journal.open(run / "journal.jsonl")
    opened.claim()
    before = contents(run)
    for change in (to_step_3, to_what_is_sound):
        with pytest.raises(JournalError, match="another process is training"):
            change(run)
    assert contents(run) == before
    opened.close()


def test_a_damaged_journal_goes_back_to_its_sound_part(run: Path, trained: Path) -> None:
    damage(run)
    damaged = contents(run)
    with pytest.raises(JournalError, match="is damaged"):
        zotune.rollback(run, 2)
    with pytest.raises(JournalError, match=r"can be recovered: 'zotune journal verify .*run --repair'"):
        zotune.resume(run, Recorder())
    assert contents(run) == damaged
    kept = branches.repair(run)
    assert kept is not None
    assert kept.name == "damaged-1"
    assert (kept.path / "journal.jsonl").read_bytes() == damaged["journal.jsonl"]
    assert 0 < kept.steps < 12
    assert max(checkpoints(run)) <= kept.steps
    assert branches.repair(run) is None
    zotune.resume(run, Recorder())
    assert (run / "journal.jsonl").read_bytes() == (trained / "journal.jsonl").read_bytes()
    assert_same(saved(run), saved(trained))
    with pytest.raises(JournalError, match="is damaged"):
        branches.switch(run, "damaged-1")


def test_a_full_disk_changes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(run)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(JournalError, match=r"No space left on device. Nothing is lost"):
            zotune.rollback(run, 7)
    assert {name: content for name, content in contents(run).items() if not name.startswith(".")} == before
    zotune.rollback(run, 7)
    assert zotune.evaluate_run(run).examples == 24
