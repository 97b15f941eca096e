"""Processes of a run that die: nothing is lost, nothing hangs, nothing is left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import psutil
from test_engine_runs import run_on, wide_model_folder  # noqa: F401
from tiny_runs import Recorder

import zotune
from zotune import config as configs
from zotune.journal import read

PROGRAM = [sys.executable, "-c", "from zotune.cli import main; main()"]
STEPS = 1_000_000


@pytest.fixture
def files(tmp_path: Path, run_on) -> tuple[Path, Path]:  # type: ignore[no-untyped-def]  # noqa: F811
    """A configuration file of a run with an engine of its own, and the run's directory."""
    chosen = run_on("vllm", "run", vllm={"own_process": True})
    chosen = chosen.having("train", steps=STEPS)
    path = tmp_path / "run.toml"
    path.write_text(configs.dump(chosen))
    return path, Path(chosen.output)


def _engine_processes(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """The engine's core and its worker."""
    driver = psutil.Process(process.pid)
    core = next(child for child in driver.children() if "resource_tracker" not in " ".join(child.cmdline()))
    return {"driver": driver, "core": core, "worker": core.children()[0]}


def _kill(who: str, words: list[str], journal: Path, chance: random.Random) -> None:
    """Start the program, kill one of its processes once it steps, and wait until nothing of it is left."""
    before = journal.read_bytes().count(b"\n") if journal.exists() else 1
    process = subprocess.Popen([*PROGRAM, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (journal.exists() and journal.read_bytes().count(b"\n") > before + 1):
        assert time.monotonic() < deadline, "no step was journalled"
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    found = _engine_processes(process)
    time.sleep(chance.uniform(0, 0.05))
    os.kill(found[who].pid, signal.SIGKILL)
    process.wait(60)
    message = process.communicate()[1]
    if who != "driver":
        assert process.returncode == 2, message
        assert "error: vLLM's engine failed" in message
        assert "zotune resume" in message
    _, alive = psutil.wait_procs(found.values(), timeout=30)
    assert alive == [], f"left behind after the {who} was killed"


@pytest.mark.slow
def test_killed_processes_lose_nothing(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Ten times each."""
    file, run = files
    chance, journal = random.Random(10), run / "journal.jsonl"
    for who in ["driver", "core", "worker"] * 10:
        _kill(who, ["resume", str(run)] if run.exists() else ["run", str(file)], journal, chance)
    done = len(read(journal).entries)
    with pytest.raises(KeyboardInterrupt):
        zotune.resume(run, Recorder(stop_after=done + 3))
    whole = configs.load(file, [f"output={tmp_path / 'whole'}", "runtime.vllm.own_process=false"])
    with pytest.raises(KeyboardInterrupt):
        zotune.start(whole, Recorder(stop_after=done + 3))
    ends = [(path / "journal.jsonl").read_text().splitlines()[1:] for path in (run, Path(whole.output))]
    assert ends[0] == ends[1]
