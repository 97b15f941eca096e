"""``zotune bench step``: whole steps of zotune and of the official procedure in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import torch

from zotune.bench import memory as memories
from zotune.bench import steps, turns, work
from zotune.bench.step_report import StepReport
from zotune.runtimes import precision

_OURS, _THEIRS = "zotune", "official"


def step(
    *,
    model: str | None = None,
    data: Path | str | None = None,
    dtype: str = "auto",
    baseline_dtype: str | None = None,
    batch_size: int = 16,
    rank: int = 2,
    scope: str = "all",
    directions: int = 1,
    repeats: int = 10,
    threads: int | None = None,
    memory: bool = False,
) -> StepReport:
    """Time ask, score, losses, tell and apply against the official LOZO step; journalling is not part of either.

    Args:
        model: Hub id or folder of a causal language model; default: the demonstration's.
        data: Folder with ``train`` and ``validation`` rows of SST-2 as ``.jsonl.gz`` or ``.jsonl``; default: the
            demonstration's reviews.
        dtype: ``bfloat16``, ``float16`` or ``float32``; ``auto``: bfloat16 where the device multiplies it natively,
            else float32.
        baseline_dtype: The same for the official procedure; default: ``dtype``.
        batch_size: Examples per step.
        rank: Columns of U and V.
        scope: Of `zotune.layout.Scope`, for zotune; the official procedure tunes every parameter.
        directions: Two-point directions per step.
        repeats: Steps to time of each side, after one that is not timed.
        threads: CPU threads; default: PyTorch's.
        memory: Also measure peak memory against bare inference, in processes of their own.

    Raises:
        ConfigError: A name is unknown or a count is not positive.
        DataError: The folder has no such rows.
        ModelError: The model cannot be loaded or tuned in this scope.
    """
    dtype = steps.resolved(dtype)
    baseline_dtype = baseline_dtype or dtype
    steps.check(dtype, baseline_dtype, scope, [batch_size, rank, directions, repeats, threads or 1])
    method = steps.method_of(scope, rank, directions)
    with steps.threads_set(threads):
        ours = steps.prepare(model=model, data=data, dtype=dtype, batch_size=batch_size)
        theirs = steps.prepare(model=model, data=data, dtype=baseline_dtype, batch_size=batch_size)
        stepper = steps.Stepper(ours, method)
        official = steps.official_of(theirs.model, method)
        device = stepper.device
        product = precision.product_dtype(getattr(torch, dtype), device.type)
        sides: dict[str, Callable[[int], object]] = {
            _OURS: stepper.step,
            _THEIRS: lambda number: official.step(theirs.batch(number)),
        }
        timing = turns.alternate(sides, {_OURS: stepper}, repeats, device, product)
        fold = timing.folds[_OURS]
        batches = [ours.batch(number) for number in range(1, repeats + 1)]
        report = StepReport(
            model=Path(model).name if model else "the demo's model",
            dtype=dtype,
            baseline_dtype=baseline_dtype,
            product_dtype=precision.name(product),
            device=str(device),
            batch_size=batch_size,
            rank=rank,
            scope=scope,
            directions=directions,
            repeats=repeats,
            threads=torch.get_num_threads(),
            step_s=median(timing.seconds[_OURS]) + fold / method.interval,
            baseline_step_s=directions * median(timing.seconds[_THEIRS]),
            tokens=round(mean(stepper.tokens(batch) for batch in batches)),
            baseline_tokens=round(directions * mean(work.padded_tokens(batch) for batch in batches)),
            flops=mean(stepper.flops(batch) for batch in batches),
            peak_flops_per_s=timing.peak,
            fold_s=fold,
            phases=timing.phases[_OURS] | {"fold": fold / method.interval},
        )
        if memory:
            settings = {"model": model, "data": data, "dtype": dtype, "batch_size": batch_size}
            settings |= {"rank": rank, "scope": scope, "directions": directions, "threads": report.threads}
            report = replace(report, memory=memories.measure(settings))
    return report
