"""``zotune bench runtimes``: the same work on every runtime and by the official procedure, in turn, in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from zotune import models
from zotune.bench import child, steps, turns
from zotune.bench.runtimes_report import RuntimeReport, RuntimesReport
from zotune.config import EngineConfig, ModelConfig, RuntimeConfig
from zotune.errors import ConfigError, unknown
from zotune.optimizer import Method
from zotune.runtimes import precision
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.engine import checkpoint_layout
from zotune.runtimes.engine.runtime import EngineRuntime, Work
from zotune.testing.baselines.lora_slots import LoraSlots
from zotune.testing.baselines.public_api import PublicApi

RUNTIMES = ("torch", "vllm", "vllm-compiled")
"""The embedded runtime, and vLLM without and with its compiler."""

PEERS = ("lora-slots", "public-api")
"""Others' ways through vLLM: `zotune.testing.baselines.lora_slots` and `zotune.testing.baselines.public_api`."""

_PROBE = "zotune.bench.runtimes_probe"


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
        names: Of `RUNTIMES` and `PEERS`; peers tune linear layers alone, whatever the scope.
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
        if name not in RUNTIMES + PEERS:
            raise ConfigError(unknown("runtime", name, RUNTIMES + PEERS))
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
        sides["official"] = lambda number: official.step(theirs.batch(number))
        device = models.chosen_device()
        timing = turns.alternate(
            sides, steppers, repeats, device, precision.product_dtype(theirs.model.dtype, device.type)
        )
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
            peak_flops_per_s=timing.peak,
            runtimes=tuple(_report(name, timing, method.interval) for name in names),
        )
    settings = given | {"scope": scope, "rank": rank, "directions": directions, "threads": count}
    return replace(report, runtimes=tuple(_apart(each, settings) for each in report.runtimes))


def _report(name: str, timing: turns.Timing, interval: int) -> RuntimeReport:
    fold = timing.folds[name] / interval
    return RuntimeReport(name, median(timing.seconds[name]) + fold, timing.phases[name] | {"fold": fold})


def _stepper(name: str, given: Mapping[str, Any], method: Method, stack: ExitStack) -> steps.Stepper:
    setting = prepare(name, given)
    stepper = steps.Stepper(setting, method, start(name, setting, method), models.chosen_device())
    stack.enter_context(closing(stepper.runtime))
    return stepper


def prepare(name: str, given: Mapping[str, Any]) -> steps.Setting:
    """Model and data as a run on this runtime loads them: an engine loads its weights itself."""
    return steps.prepare(**given, load=models.load if name == "torch" else checkpoint_layout.load)


def start(name: str, setting: steps.Setting, method: Method, seed: int = 0) -> steps.Timed:
    """What scores and learns on the setting's checkpoint, ready for its batches.

    Args:
        name: Of `RUNTIMES` or `PEERS`.
        setting: Model and batches.
        method: What to tune and how; peers take its scope as ``linear``.
        seed: The run's seed.
    """
    if name == "torch":
        return EmbeddedRuntime(setting.model, method, seed=seed)
    work = Work.of(setting.dataset, setting.batch_size, method)
    dtype = precision.name(setting.model.dtype)
    config = ModelConfig.model_validate({"path": setting.model.name_or_path, "dtype": dtype})
    if name in PEERS:
        # They send whole sequences, the last token included, and vLLM has to write one more.
        method, work = replace(method, scope="linear"), replace(work, longest=work.longest + 1)
    if name == "public-api":
        return PublicApi(config, setting.model, method, seed=seed, longest=work.longest)
    options = EngineConfig(compile=name == "vllm-compiled", adapters="lora" if name == "lora-slots" else "none")
    engine = EngineRuntime.start(
        config, setting.model, method, seed=seed, options=RuntimeConfig(type="vllm", vllm=options), work=work
    )
    return LoraSlots(engine) if name == "lora-slots" else engine


def _apart(report: RuntimeReport, settings: Mapping[str, Any]) -> RuntimeReport:
    """The report with start-up time and peak memory, measured in a process of its own."""
    found = child.figures(_PROBE, report.runtime, settings)
    return replace(report, startup_s=found["startup_s"], peak_bytes=found["peak_bytes"])
