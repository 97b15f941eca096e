"""``zotune bench runtimes``: the same work on every runtime and by the official procedure, in turn, in one run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from zotune import models
from zotune.bench import steps, work
from zotune.bench.runtimes_report import RuntimeReport, RuntimesReport
from zotune.config import EngineConfig, ModelConfig, RuntimeConfig
from zotune.errors import ConfigError, ZotuneError, unknown
from zotune.optimizer import Method
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.engine import checkpoint_layout
from zotune.runtimes.precision import product_dtype

RUNTIMES = ("torch", "vllm", "vllm-compiled")
"""What can be compared: the embedded runtime, and vLLM without and with its compiler."""

_FOLDS = 3


def runtimes(
    names: Sequence[str] = ("torch", "vllm"),
    *,
    model: str | None = None,
    data: Path | None = None,
    dtype: str = "auto",
    batch_size: int = 16,
    rank: int = 2,
    scope: str = "all",
    directions: int = 1,
    repeats: int = 9,
    threads: int | None = None,
) -> RuntimesReport:
    """Time ask, score, losses, tell and apply on each runtime against the official LOZO step.

    Args:
        names: Of `RUNTIMES`.
        model: As for `zotune.bench.step`, like all that follow.
        data: See there.
        dtype: Of the model under every runtime and the official procedure.
        batch_size: Examples per step.
        rank: Columns of U and V.
        scope: What zotune tunes.
        directions: Two-point directions per step.
        repeats: Steps to time of each side.
        threads: CPU threads.

    Raises:
        ConfigError: A name is unknown, a count is not positive, or vLLM is not installed.
        ZotuneError: A process that measures start-up and memory failed.
    """
    for name in names:
        if name not in RUNTIMES:
            raise ConfigError(unknown("runtime", name, RUNTIMES))
    dtype = steps.resolved(dtype)
    steps.check(dtype, dtype, scope, [batch_size, rank, directions, repeats, threads or 1])
    method = steps.method_of(scope, rank, directions)
    given: dict[str, Any] = {"model": model, "data": data, "dtype": dtype, "batch_size": batch_size}
    with ExitStack() as stack:
        stack.enter_context(steps.threads_set(threads))
        count = torch.get_num_threads()
        steppers = {name: _stepper(name, given, method, stack) for name in names}
        theirs = steps.prepare(**given)
        official = steps.official_of(theirs.model, method)
        sides: dict[str, Callable[[int], object]] = {name: each.step for name, each in steppers.items()}
        timing = _alternate(sides | {"official": lambda number: official.step(theirs.batch(number))}, steppers, repeats)
        batches = [theirs.batch(number) for number in range(1, repeats + 1)]
        flops = mean(next(iter(steppers.values())).flops(batch) for batch in batches)
        report = RuntimesReport(
            model=Path(model).name if model else "the demo's model",
            dtype=dtype,
            batch_size=batch_size,
            rank=rank,
            scope=scope,
            directions=directions,
            repeats=repeats,
            threads=count,
            baseline_step_s=directions * median(timing.seconds["official"]),
            flops=flops,
            peak_flops_per_s=max(timing.peaks),
            runtimes=tuple(_report(name, timing, method, steppers[name]) for name in names),
        )
    settings = given | {"scope": scope, "rank": rank, "directions": directions, "threads": count}
    return replace(report, runtimes=tuple(_apart(each, settings) for each in report.runtimes))


class _Timing:
    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.phases: dict[str, dict[str, float]] = {}
        self.peaks: list[float] = []


def _alternate(
    sides: Mapping[str, Callable[[int], object]], steppers: Mapping[str, steps.Stepper], repeats: int
) -> _Timing:
    """Warm all sides up, then time them in turn, a few steps at a time, on the same batches."""
    timing = _Timing()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    product = product_dtype(next(iter(steppers.values())).setting.model.dtype, device.type)
    for step in sides.values():
        step(0)
    before = {name: dict(each.runtime.timings) for name, each in steppers.items()}
    for start in range(1, repeats + 1, steps.TURN):
        for name, step in sides.items():
            turn = range(start, min(start + steps.TURN, repeats + 1))
            spent = [steps.seconds(partial(step, number), device) for number in turn]
            timing.seconds.setdefault(name, []).extend(spent)
        timing.peaks.append(work.matmul_peak(product, device))
    for name, each in steppers.items():
        after = each.runtime.timings
        timing.phases[name] = {phase: (after[phase] - before[name][phase]) / repeats for phase in after}
    return timing


def _report(name: str, timing: _Timing, method: Method, stepper: steps.Stepper) -> RuntimeReport:
    taken = timing.seconds[name]
    phases = timing.phases[name]
    phases["other"] = mean(taken) - sum(phases.values())
    phases["fold"] = median(steps.seconds(stepper.fold, stepper.device) for _ in range(_FOLDS)) / method.interval
    return RuntimeReport(name, median(taken) + phases["fold"], phases)


def _stepper(name: str, given: Mapping[str, Any], method: Method, stack: ExitStack) -> steps.Stepper:
    setting = prepare(name, given)
    stepper = steps.Stepper(setting, method, start(name, setting, method))
    stack.enter_context(closing(stepper.runtime))
    return stepper


def prepare(name: str, given: Mapping[str, Any]) -> steps.Setting:
    """Model and data as a run on this runtime loads them: an engine loads its weights itself."""
    return steps.prepare(**given, load=models.load if name == "torch" else checkpoint_layout.load)


def start(name: str, setting: steps.Setting, method: Method, seed: int = 0) -> steps.Timed:
    """A runtime on the setting's checkpoint, ready for its batches.

    Args:
        name: Of `RUNTIMES`.
        setting: Model and batches.
        method: What to tune and how.
        seed: The run's seed.
    """
    if name == "torch":
        return EmbeddedRuntime(setting.model, method, seed=seed)
    from zotune.runtimes.engine.runtime import EngineRuntime, Work

    dtype = str(setting.model.dtype).removeprefix("torch.")
    options = RuntimeConfig(type="vllm", vllm=EngineConfig(compile=name == "vllm-compiled"))
    return EngineRuntime.start(
        ModelConfig.model_validate({"path": setting.model.name_or_path, "dtype": dtype}),
        setting.model,
        method,
        seed=seed,
        options=options,
        work=Work.of(setting.dataset, setting.batch_size, method),
    )


def _apart(report: RuntimeReport, settings: Mapping[str, Any]) -> RuntimeReport:
    """The report with start-up time and peak memory, measured in a process of its own."""
    command = [sys.executable, "-m", "zotune.bench.runtimes_probe", report.runtime, json.dumps(settings, default=str)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ZotuneError(f"measuring the start of {report.runtime} failed: {last[0]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return replace(report, startup_s=found["startup_s"], peak_bytes=found["peak_bytes"])
