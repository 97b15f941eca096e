"""Results as `zotune bench scaling` and `overhead` keep them, with made figures."""

from __future__ import annotations

from typing import Any

from zotune.bench.overhead import PHASES
from zotune.bench.results import Result

PEAK = 1e15
MACHINE = {
    "cpu": "EPYC",
    "cores": 2,
    "gpu": "H100",
    "versions": {"torch": "2.13", "vllm": None},
    "commit": "abc1234",
    "date": "2026-11-25T10:00:00+00:00",
    "command": ["/usr/bin/zotune", "bench", "scaling"],
}
_METHOD = {"scope": "all", "rank": 2, "directions": 1}


def scaling(runtime: str, step_s: float, *, batch: int = 16, gpu: str = "H100", **case: Any) -> Result:
    """A step of OPT-1.3B of so many seconds, which computes a tenth of what the card could in 0.1 s."""
    settings = {"model": "opt-1.3b", "runtime": runtime, "dtype": "bfloat16", "threads": 8, "batch_size": batch}
    method = {} if runtime == "official" else _METHOD
    figures = {
        "step_s": step_s,
        "tokens": 46 * batch * case.get("directions", 1),
        "flops": 0.01 * PEAK,
        "parameters": 1e9 * float(case.get("model", "opt-1.3b").partition("-")[2].rstrip("b")),
        "peak_flops_per_s": PEAK,
    }
    return Result("scaling", {**settings, **method, **case}, figures, {**MACHINE, "gpu": gpu})


def overhead(runtime: str, host_s: float | None, **phases: float) -> Result:
    """A split step; phases that are not given took no time."""
    case = {"model": "opt-1.3b", "runtime": runtime, "dtype": "bfloat16", "threads": 8, "batch_size": 16, **_METHOD}
    spent = dict.fromkeys(PHASES, 0.0) | phases
    figures = {"step_s": sum(spent.values()), "host_s": host_s, "phases_s": spent, "repeats": 20}
    return Result("overhead", case, figures, MACHINE)
