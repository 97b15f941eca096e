"""benchmarks/gpu_steps.py with a tiny model on the CPU, and without what a GPU machine may lack."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zotune.bench.results import every

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_steps.py"
LACKING = ("typer", "matplotlib", "jinja2", "tensorboardX", "peft", "datasets")


def run(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Call the script where some packages cannot be imported, in its processes neither."""
    hook = out.parent / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({LACKING!r}))\n")
    path = os.pathsep.join([str(hook), str(SCRIPT.parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--models", "tiny-opt", "--repeats", "4", *words]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_table_in_one_command(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--batches", "2", "--runtimes", "torch")
    assert done.returncode == 0, done.stderr
    found = {(result.kind, result.case["runtime"]): result.figures for result in every(tmp_path / "out")}
    assert found.keys() == {("scaling", "official"), ("scaling", "torch"), ("overhead", "torch")}
    assert all(figures["step_s"] > 0 for figures in found.values()), found
    theirs, ours = found["scaling", "official"], found["scaling", "torch"]
    assert (theirs["repeats"], theirs["length"]) == (ours["repeats"], ours["length"]), "the same rows"
    report = (tmp_path / "out" / "report.md").read_text()
    assert report in done.stdout
    assert "| tiny-opt | all | 2 | 1 | 2 |" in report
    assert ".png" not in report


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--batches", "0")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: batch size")
    assert "Traceback" not in done.stderr
