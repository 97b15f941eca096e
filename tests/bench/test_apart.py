"""Cases in processes of their own. Starting one takes seconds, so each test asks several things of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from zotune.bench import apart
from zotune.bench.apart import Apart
from zotune.bench.cases import TimeIsUp
from zotune.errors import ModelError, ZotuneError


def start(case: Mapping[str, Any]) -> int:
    if case["model"] == "unknown":
        with Path(case["tried"]).open("a") as file:
            file.write("x")
        raise ModelError("no such model")
    return os.getpid()


def measure(pid: int, case: Mapping[str, Any]) -> dict[str, Any]:
    if case["batch_size"] == 13:
        raise MemoryError("13 is too many")
    if case["batch_size"] == 14:
        os.kill(pid, signal.SIGKILL)
    if case["batch_size"] == 15:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(case["model"]).write_text(str(child.pid))
        child.wait()
    return {"pid": pid}


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def case(batch: int, model: str = "a", **more: Any) -> dict[str, Any]:
    return {"model": model, "batch_size": batch, **more}


def test_batches_share_a_process_which_a_failed_one_leaves_alive_and_a_killed_one_does_not() -> None:
    with Apart(start, measure) as processes:
        first = processes.measure(case(1))["pid"]
        assert first != os.getpid()
        with pytest.raises(ZotuneError, match="13 is too many"):
            processes.measure(case(13))
        assert processes.measure(case(2))["pid"] == first
        with pytest.raises(ZotuneError, match="exit code -9"):
            processes.measure(case(14))
        second = processes.measure(case(3))["pid"]
        assert second != first
    assert not psutil.pid_exists(second)


@pytest.mark.slow
def test_what_cannot_start_is_tried_once_for_all_batches(tmp_path: Path) -> None:
    tried = str(tmp_path / "tried")
    with Apart(start, measure) as processes:
        for batch in (1, 2):
            with pytest.raises(ZotuneError, match="no such model"):
                processes.measure(case(batch, "unknown", tried=tried))
    assert Path(tried).read_text() == "x"


@pytest.mark.slow
def test_a_case_that_overruns_is_ended_with_what_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted, clock = tmp_path / "pid", time.monotonic
    began = clock()
    with Apart(start, measure, minutes=60) as processes:
        processes.measure(case(1, str(noted)))
        # Of which five seconds are left.
        ahead = began + 3600 + apart.GRACE - 5 - clock()
        monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead)
        with pytest.raises(TimeIsUp):
            processes.measure(case(15, str(noted)))
    assert is_gone(int(noted.read_text()))


def test_nothing_is_left_when_the_parent_is_killed(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    script = "import sys, test_apart as t; t.Apart(t.start, t.measure).measure(t.case(15, sys.argv[1]))"
    parent = subprocess.Popen([sys.executable, "-c", script, str(noted)], cwd=Path(__file__).parent)
    until = time.monotonic() + 300
    while not (noted.exists() and noted.read_text()):
        assert time.monotonic() < until
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    while not is_gone(int(noted.read_text())):
        assert time.monotonic() < until
        time.sleep(0.1)
