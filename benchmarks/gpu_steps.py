"""Milliseconds per step on one GPU: zotune's runtimes against the official LOZO step, for OPT of several sizes.

Nothing is downloaded: the models have OPT's shapes and random weights, the rows SST-2's lengths and random tokens.
Every cell of the table (model, batch, runtime) is a file in ``--out``; what is there already is not measured again.

    PYTHONPATH=src python benchmarks/gpu_steps.py --out gpu-steps
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_sides
from gpu_sides import OFFICIAL, RUNTIMES, SHAPES, Task, path_of, write

GRACE = 60
"""Seconds that a process may overrun the time budget before it is ended."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1.3b,2.7b,6.7b,13b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--batches", default="16,32,64,128", help="examples per step")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="besides the official step, always measured")
    parser.add_argument("--out", type=Path, default=Path("gpu-steps"), help="folder of cells and of the table")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per cell")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further cell after so long")
    parser.add_argument("--retry", action="store_true", help="measure again the cells that failed")
    chosen = parser.parse_args(words)
    for field, known in (("models", SHAPES), ("runtimes", RUNTIMES)):
        names = [name.strip().lower() for name in getattr(chosen, field).split(",") if name.strip()]
        if odd := [name for name in names if name not in known]:
            parser.error(f"--{field}: unknown {odd[0]!r}; known: {', '.join(known)}")
        setattr(chosen, field, names)
    try:
        chosen.batches = sorted({int(batch) for batch in chosen.batches.split(",")})
    except ValueError:
        parser.error(f"--batches: got {chosen.batches!r}; give numbers with commas between them")
    if min([*chosen.batches, chosen.steps]) < 1:
        parser.error("--batches and --steps must be at least 1")
    return chosen


def main() -> int:
    chosen = arguments()
    chosen.out.mkdir(parents=True, exist_ok=True)
    runtimes = [OFFICIAL, *chosen.runtimes]
    if any(name.startswith("vllm") for name in runtimes) and importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed, so it is left out: pip install 'zotune[vllm]'", file=sys.stderr)
        runtimes = [name for name in runtimes if not name.startswith("vllm")]
    deadline = time.time() + 60 * chosen.minutes
    for model in chosen.models:
        for runtime in runtimes:
            if missing(chosen, model, runtime) and time.time() < deadline:
                print(f"{model} {runtime} ...", file=sys.stderr, flush=True)
                child(chosen, model, runtime, deadline)
    text = table(cells(chosen.out), chosen.models, chosen.batches, runtimes)
    (chosen.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def child(chosen: argparse.Namespace, model: str, runtime: str, deadline: float) -> None:
    """Measure in a process of its own, which has the GPU to itself; dying without a word fails its first cell."""
    batches = missing(chosen, model, runtime)
    task = Task(str(chosen.out.resolve()), model, runtime, batches, chosen.steps, deadline)
    words = [sys.executable, gpu_sides.__file__, json.dumps(asdict(task))]
    began, left = time.time(), max(0.0, deadline - time.time()) + GRACE
    process = subprocess.Popen(words, start_new_session=True)
    code = 0
    try:
        code = process.wait(left if left < float("inf") else None)
    except subprocess.TimeoutExpired:
        print(f"{model} {runtime}: ended, the time is up", file=sys.stderr)
    finally:
        # Also what an engine has started.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    first = path_of(chosen.out, model, batches[0], runtime)
    if code and not (first.exists() and first.stat().st_mtime > began):
        write(chosen.out, model, batches[0], runtime, {"error": f"its process ended with exit code {code}"})


def missing(chosen: argparse.Namespace, model: str, runtime: str) -> list[int]:
    """Batches of which there is no cell yet."""
    found = {batch: read(path_of(chosen.out, model, batch, runtime)) for batch in chosen.batches}
    return [batch for batch, cell in found.items() if cell is None or (chosen.retry and "error" in cell)]


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def cells(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def table(
    found: Sequence[dict[str, Any]], models: Sequence[str], batches: Sequence[int], runtimes: Sequence[str]
) -> str:
    """The cells as Markdown: milliseconds per step, times faster than the official step, share of the card's peak."""
    by_place = {(cell["model"], cell["batch"], cell["runtime"]): cell for cell in found}
    measured = [cell for cell in found if "step_ms" in cell]
    peaks: dict[str, float] = {}
    for cell in measured:
        peaks[cell["device"]] = max(cell["peak_flops_per_s"], peaks.get(cell["device"], 0.0))
    lines = [
        "| OPT | batch | " + " | ".join(f"{name}, ms" for name in runtimes) + " |",
        "|---" * (2 + len(runtimes)) + "|",
    ]
    for model in models:
        for batch in batches:
            official = by_place.get((model, batch, OFFICIAL))
            shown = (_shown(by_place.get((model, batch, name)), official, peaks) for name in runtimes)
            lines.append(f"| {model} | {batch} | " + " | ".join(shown) + " |")
    lines += [
        "",
        "In brackets: times faster than the official step on the same card; share of the card's matmul peak.",
        "",
    ]
    lines += [f"- {device}: matmul peak {peak / 1e12:.3g} TFLOP/s (bfloat16)" for device, peak in sorted(peaks.items())]
    lines += [f"- {line}" for line in sorted({cell["software"] for cell in measured})]
    lines += [
        f"- {cell['model']}, {cell['batch']}, {cell['runtime']}: {cell['error']}" for cell in found if "error" in cell
    ]
    return "\n".join(lines) + "\n"


def _shown(cell: dict[str, Any] | None, official: dict[str, Any] | None, peaks: dict[str, float]) -> str:
    if cell is None:
        return "not run"
    if "error" in cell:
        return "failed"
    text = f"{cell['step_ms']:.1f}"
    if cell["runtime"] == OFFICIAL:
        return text
    share = cell["flops"] / (cell["step_ms"] / 1e3) / peaks[cell["device"]]
    compared = official is not None and official.get("device") == cell["device"]
    faster = f"{official['step_ms'] / cell['step_ms']:.2f}x, " if compared and official else ""
    return f"{text} ({faster}{share:.0%})"


if __name__ == "__main__":
    sys.exit(main())
