"""A run cannot be lost: kills, torn files, full disks and second writers, on real processes and real files."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from tiny_runs import Recorder, assert_same, contents, saved

import zotune
from zotune import checkpoint, config, journal
from zotune.config import Config
from zotune.errors import JournalError, ZotuneError
from zotune.journal import Journal
from zotune.reporters import Record
from zotune.run import RunDirectory

Configure = Callable[..., Config]
PROGRAM = [sys.executable, "-c", "from zotune.cli import main; main()"]
METHOD: dict[str, Any] = {"preset": "lozo-m", "interval": 7, "directions": 2}
OFTEN = {"checkpoint_every": 3, "eval_every": 5}


@pytest.fixture
def configure(tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]) -> Configure:
    return partial(tiny_runs.configure, tmp_path, tiny_model_folder, sentiment_files)


def program(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    )


def wait_for_records(process: subprocess.Popen[str], path: Path, count: int) -> None:
    """Return once the journal has so many steps."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > count):
        assert time.monotonic() < deadline, "no step was journalled"
        time.sleep(0.001)
    assert process.poll() is None, process.communicate()[1]


def whole_records(path: Path) -> bytes:
    """What a journal holds, but for a torn last line: the step in flight."""
    text = path.read_bytes()
    return text[: text.rfind(b"\n") + 1]


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_comes_to_the_same_bits(
    configure: Configure, tmp_path: Path, kills: int
) -> None:
    """SIGKILL at random moments; some hit loading and replay, most hit steps, evaluations and checkpoints."""
    chance = random.Random(kills)
    run, file = tmp_path / "killed", tmp_path / "killed.toml"
    values: dict[str, Any] = {"method": METHOD, "model": {"dtype": "bfloat16"}}
    file.write_text(config.dump(configure(output="killed", train=OFTEN | {"steps": 1_000_000}, **values)))
    path, known, early = run / "journal.jsonl", b"", 0
    for kill in range(kills):
        process = program("resume", run) if run.exists() else program("run", file)
        if kill and chance.random() < 0.2:
            early += 1
            time.sleep(chance.uniform(0, 6))
        else:
            wait_for_records(process, path, known.count(b"\n") + chance.randrange(12))
            time.sleep(chance.uniform(0, 0.02))
        seen = whole_records(path)
        process.kill()
        process.communicate()
        assert seen.startswith(known)
        known = whole_records(path)
        assert known.startswith(seen)

    done = len(journal.read(path).entries)
    total = done + 15
    zotune.start(configure(output="whole", train={"steps": total}, **values), Recorder())
    summary = zotune.resume(run, Recorder(), steps=total)
    assert (summary.steps, summary.skipped) == (total, 0)
    assert journal.read(path).entries == journal.read(tmp_path / "whole" / "journal.jsonl").entries
    assert_same(saved(run), saved(tmp_path / "whole"))
    assert RunDirectory(run).recorded_steps() == set(range(1, total + 1))
    print(f"{kills} kills, {early} at any moment since the process began, {done} steps until the last one")


def test_sigterm_saves_at_once_and_says_how_to_go_on(configure: Configure, tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "run.toml"
    file.write_text(config.dump(configure(method=METHOD, train={"steps": 1_000_000})))
    process = program("run", file)
    wait_for_records(process, run / "journal.jsonl", 5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert errors.splitlines()[-1] == f"terminated; go on with: zotune resume {run}"
    assert "Traceback" not in errors
    entries = journal.read(run / "journal.jsonl").entries
    assert checkpoint.sound(run / "checkpoints", len(entries))
    zotune.start(configure(output="whole", method=METHOD, train={"steps": len(entries)}), Recorder())
    assert_same(saved(run), saved(tmp_path / "whole"))


@pytest.fixture
def short(configure: Configure, tmp_path: Path) -> Path:
    """A finished run of six steps in windows of three, with checkpoints after each."""
    train = {"steps": 6, "checkpoint_every": 1, "keep_checkpoints": 9}
    zotune.start(configure(output="short", method=METHOD | {"interval": 3}, train=train), Recorder())
    return tmp_path / "short"


def last_two_records(path: Path) -> tuple[bytes, range]:
    """A journal, and the lengths that cut it anywhere in its last two records."""
    whole = path.read_bytes()
    *_, a, b = whole.splitlines(keepends=True)
    return whole, range(len(whole) - len(a) - len(b), len(whole))


def test_a_journal_cut_at_any_byte_keeps_its_whole_records_and_is_written_on(short: Path) -> None:
    path = short / "journal.jsonl"
    whole, sizes = last_two_records(path)
    entries = journal.read(path).entries
    for size in sizes:
        path.write_bytes(whole[:size])
        cut = Journal.open(path)
        assert cut.entries == entries[: whole[:size].count(b"\n") - 1]
        assert cut.dropped == (whole[size - 1 : size] != b"\n")
        cut.claim()
        for entry in entries[len(cut.entries) :]:
            cut.append(entry)
        cut.close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_whose_journal_was_cut_goes_on_to_the_same_bits(short: Path, every: int) -> None:
    path = short / "journal.jsonl"
    whole, sizes = last_two_records(path)
    expected = saved(short)
    for size in {*sizes[::every], sizes[-1]}:
        path.write_bytes(whole[:size])
        # With the checkpoints that were ahead of the journal, with those that were not, and with none.
        for checkpoint_of in (short / "checkpoints").iterdir():
            if size % 3 == 0 or (size % 3 == 1 and checkpoint_of.name > "step-00000004"):
                shutil.rmtree(checkpoint_of)
        zotune.resume(short, Recorder())
        assert path.read_bytes() == whole
        assert_same(saved(short), expected)


class FullDisk(Recorder):
    """After some steps, no file may become larger than one of the run's is now, by so many bytes."""

    def __init__(self, path: Path, more: int, after: int = 8) -> None:
        super().__init__()
        self.path, self.more, self.after = path, more, after
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def step(self, record: Record) -> None:
        super().step(record)
        if record["step"] == self.after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.path.stat().st_size + self.more, self.before[1]))

    def finish(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


# By what is first too large: the kind of run, the bytes that it may still grow by, the steps that it comes to.
FULL: dict[str, tuple[dict[str, Any], int, int]] = {
    "journal.jsonl": ({"method": METHOD | {"directions": 16}}, 700, 8),
    "metrics.jsonl": (
        {
            "train": {"eval_every": 1, "checkpoint_every": 5},
            "data": {"prompt": "the", "completion": "{text}", "candidates": None, "label": None},
        },
        50,
        8,
    ),
    "predictions.jsonl": ({"train": {"eval_every": 1, "checkpoint_every": 5}}, 50, 8),
    "checkpoints": ({"train": {"checkpoint_every": 5}}, 3000, 10),
}


@pytest.mark.parametrize("file", FULL)
def test_a_full_disk_ends_the_run_with_whole_records(configure: Configure, tmp_path: Path, file: str) -> None:
    """The limit is the size of a file: a process that meets it is told as one whose disk is full is."""
    kind, more, steps = FULL[file]
    kind = {"train": {"checkpoint_every": 5}} | kind
    zotune.start(configure(output="whole", **kind), Recorder())
    run = tmp_path / "run"
    watched = "metrics.jsonl" if file == "checkpoints" else file
    with pytest.raises(JournalError, match=f"{file}.* resume"):
        zotune.start(configure(**kind), FullDisk(run / watched, more))
    text = (run / "journal.jsonl").read_bytes()
    assert text.endswith(b"\n"), "the half of a record is taken back"
    assert len(journal.read(run / "journal.jsonl").entries) == steps
    assert all(path.name.startswith("step-") for path in (run / "checkpoints").iterdir()), "the half of one is removed"
    assert checkpoint.sound(run / "checkpoints", 5)
    zotune.resume(run, Recorder())
    assert_same(saved(run), saved(tmp_path / "whole"))
    assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())


@contextmanager
def bound_by_permissions() -> Iterator[None]:
    """As a user whom permissions bind; they do not bind root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_run_directory_that_is_read_only_is_refused(configure: Configure) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = configure(train={"steps": 3})
        model = shutil.copytree(chosen.model.path, folder / "model")
        rows = {key: shutil.copy(str(getattr(chosen.data, key)), folder) for key in ("train", "validation")}
        local = chosen.model_copy(
            update={
                "output": str(folder / "run"),
                "model": chosen.model.model_copy(update={"path": str(model)}),
                "data": chosen.data.model_copy(update=rows),
            }
        )
        zotune.start(local, Recorder())
        for path in (folder, *folder.rglob("*")):
            os.chmod(path, stat.S_IRUSR | stat.S_IXUSR | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
        before = contents(folder)
        with bound_by_permissions():
            with pytest.raises(JournalError, match=r"cannot write to .*journal.jsonl: Permission denied"):
                zotune.resume(folder / "run", Recorder(), steps=5)
            with pytest.raises(ZotuneError, match=r"cannot make the run directory .*other: Permission denied"):
                zotune.start(local.model_copy(update={"output": str(folder / "other")}), Recorder())
            assert zotune.evaluate_run(folder / "run").examples == 24, "looking on is allowed"
        assert contents(folder) == before
        for path in (folder, *folder.rglob("*")):
            os.chmod(path, stat.S_IRWXU)


def test_of_two_processes_that_resume_a_run_one_is_refused(configure: Configure, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        zotune.start(configure(train={"steps": 1_000_000}), Recorder(stop_after=3))
    first = program("resume", run)
    wait_for_records(first, run / "journal.jsonl", 4)
    # It reads the journal while the first one writes on: it is refused by the lock, whatever it has read.
    with pytest.raises(JournalError, match=f"another process is training in {run}"):
        zotune.resume(run, Recorder())
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130, errors
    entries = journal.read(run / "journal.jsonl").entries
    assert [entry.step for entry in entries] == list(range(len(entries)))


def test_what_appears_at_the_output_while_the_model_loads_is_not_touched(configure: Configure, tmp_path: Path) -> None:
    chosen = configure()
    header = Journal.open(_a_run(configure, tmp_path) / "journal.jsonl").header
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(ZotuneError, match="exists"):
        RunDirectory.create(chosen, header)
    assert contents(tmp_path / "run") == {"mine": b""}
    assert not list(tmp_path.glob(".*.part"))


def test_a_draft_that_a_killed_process_left_costs_no_try(configure: Configure, tmp_path: Path) -> None:
    left = tmp_path / f".run.{os.getpid()}.part"
    left.mkdir()
    zotune.start(configure(train={"steps": 1}), Recorder())
    assert left.exists()


def _a_run(configure: Configure, tmp_path: Path) -> Path:
    zotune.start(configure(output="other", train={"steps": 1}), Recorder())
    return tmp_path / "other"
