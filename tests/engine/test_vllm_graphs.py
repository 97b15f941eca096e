"""benchmarks/vllm_graphs.py with a tiny model on the CPU, where there is vLLM but no graph."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "vllm_graphs.py"), "--out", str(out), "--model", "tiny-opt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *words], capture_output=True, text=True, check=False, env=environment)


def test_ways_are_timed_and_their_losses_compared(tmp_path: Path) -> None:
    ways = ["piecewise", "full-not-compiled"]
    done = run(tmp_path, "--ways", *ways, "--batches", "2", "--repeats", "3", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert lines == done.stdout.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:2] for row in cells] == [[way, "2"] for way in ways]
    assert all(float(row[2]) > 0 for row in cells)
    assert float(cells[0][4]) == 0
    assert float(cells[1][4]) < 1e-4
    for way in ways:
        assert "on_score" in (tmp_path / f"{way}.txt").read_text()


def test_a_way_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    done = run(tmp_path, "--ways", "full-not-compiled", "--batches", "2", "--repeats", "2", "--dtype", "float8")
    assert done.returncode == 1
    assert "| full-not-compiled | failed: " in done.stdout


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--batches", "0")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: batches and repeats")
    assert "Traceback" not in done.stderr
