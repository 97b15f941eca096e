"""benchmarks/gpu_steps.py with a tiny model on the CPU."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
TINY = ("--models", "tiny", "--batches", "2", "--steps", "2")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("gpu_steps")


@pytest.fixture
def sides(script: Any) -> Any:
    return importlib.import_module("gpu_sides")


def run(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "gpu_steps.py"), "--out", str(out), *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_a_table_and_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    done = run(tmp_path, *TINY, "--runtimes", "torch")
    assert done.returncode == 0, done.stderr
    cells = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert cells.keys() == {"tiny-2-official", "tiny-2-torch"}
    ours, theirs = cells["tiny-2-torch"], cells["tiny-2-official"]
    assert ours["tokens"] == theirs["tokens"] >= 2 * 6
    assert 0 < ours["best_ms"] <= ours["step_ms"] < theirs["step_ms"]
    assert f"{ours['step_ms']:.1f} ({theirs['step_ms'] / ours['step_ms']:.2f}x" in done.stdout
    assert (tmp_path / "table.md").read_text() in done.stdout

    (tmp_path / "tiny-2-torch.json").write_text(json.dumps({**ours, "step_ms": 1234.5}))
    again = run(tmp_path, *TINY, "--runtimes", "torch")
    assert "1234.5" in again.stdout
    assert "..." not in again.stderr


def test_no_cell_is_begun_when_the_time_is_up(tmp_path: Path) -> None:
    done = run(tmp_path, *TINY, "--minutes", "0", "--runtimes", "torch")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.json")) == []
    assert "| tiny | 2 | not run | not run |" in done.stdout


def test_a_process_that_is_killed_is_a_failed_cell_and_can_be_tried_again(
    script: Any, sides: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dies.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    chosen = script.arguments([*TINY, "--out", str(tmp_path)])
    monkeypatch.setattr(sides, "__file__", str(tmp_path / "dies.py"))
    script.child(chosen, "tiny", "torch", float("inf"))
    assert script.missing(chosen, "tiny", "torch") == []
    assert "exit code -9" in script.table(script.cells(tmp_path), ["tiny"], [2], ["torch"])
    chosen.retry = True
    assert script.missing(chosen, "tiny", "torch") == [2]


def test_cells_of_another_card_are_not_compared(script: Any, sides: Any, tmp_path: Path) -> None:
    common = {"flops": 1e12, "peak_flops_per_s": 1e15, "software": "torch 2"}
    sides.write(tmp_path, "1.3b", 16, "official", {**common, "step_ms": 100.0, "device": "H100"})
    sides.write(tmp_path, "1.3b", 16, "torch", {**common, "step_ms": 10.0, "device": "H100"})
    sides.write(tmp_path, "1.3b", 16, "vllm", {**common, "step_ms": 5.0, "device": "H200"})
    text = script.table(script.cells(tmp_path), ["1.3b"], [16], ["official", "torch", "vllm"])
    assert "| 1.3b | 16 | 100.0 | 10.0 (10.00x, 10%) | 5.0 (20%) |" in text


@pytest.mark.parametrize("words", [("--models", "14b"), ("--runtimes", "jax"), ("--batches", "many"), ("--steps", "0")])
def test_unknown_names_are_refused(script: Any, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.arguments(words)
    assert words[0] in capsys.readouterr().err


def test_rows_are_as_long_as_those_of_sst2(sides: Any) -> None:
    examples = [example for batch in sides.batches(128, 20) for example in batch]
    lengths = [len(example.row.prompt) for example in examples]
    assert statistics.mean(lengths) == pytest.approx(sides.MEAN, abs=0.5)
    assert min(lengths) >= sides.SHORTEST
    assert max(lengths) <= sides.LONGEST
    assert sides.batches(4, 2) == sides.batches(4, 2)
    assert {example.gold for example in examples} == {0, 1}


@pytest.mark.parametrize(("name", "billions"), [("1.3b", 1.3), ("2.7b", 2.7), ("6.7b", 6.7), ("13b", 13.0)])
def test_shapes_have_the_sizes_that_they_are_named_after(sides: Any, name: str, billions: float) -> None:
    network = sides.network_of(name, "meta")
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.slow
def test_vllm_with_random_weights(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    done = run(tmp_path, *TINY, "--runtimes", "vllm")
    cell = json.loads((tmp_path / "tiny-2-vllm.json").read_text())
    assert "error" not in cell, done.stderr
    assert {"draw", "forward", "head", "apply"} <= cell["phases_ms"].keys()
