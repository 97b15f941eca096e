"""``zotune bench scaling``: how long a step takes for models, batches and methods of several sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console

from zotune.bench import apart, shapes, sides, work
from zotune.bench.plan import Plan
from zotune.bench.results import Case, Result, Results
from zotune.bench.steps import Stepper
from zotune.bench.turns import fold_seconds, seconds
from zotune.peak import forget_peak, peak_bytes
from zotune.runtimes.precision import product_dtype

KIND = "scaling"


def scaling(
    wanted: Plan,
    folder: Path,
    *,
    repeats: int = 10,
    minutes: float = float("inf"),
    retry: bool = False,
    console: Console | None = None,
) -> list[Result]:
    """Time whole steps (ask, score, losses, tell, apply) of every case that has no result in the folder yet.

    Models have random weights, rows random tokens and SST-2's lengths. A case that fails is a result, too.

    Args:
        wanted: The cases.
        folder: Where results are and go.
        repeats: Steps to time of each case.
        minutes: Begin no case after so long, and end what runs a minute longer.
        retry: Measure again what failed.
        console: Told of every case; default: the terminal.

    Returns:
        The results of the cases that have one now.

    Raises:
        DataError: A result in the folder is damaged.
    """
    start, act = partial(sides.start, batches=wanted.batches), partial(measure, repeats=repeats)
    return apart.run(Results(folder, KIND), wanted, start, act, minutes=minutes, retry=retry, console=console)


def measure(side: sides.Side, case: Case, repeats: int) -> Mapping[str, Any]:
    """The figures of a case.

    Returns:
        * ``step_s``: median of a whole step, with a 1/interval share of the fold; ``best_s``, ``worst_s``: without it;
        * ``fold_s``: a fold, whole;
        * ``phases_s``: mean seconds by the runtime's own clock; a GPU's time counts where the host first waits for it;
        * ``tokens``: computed by a step, with all probes, and with the official procedure's padding;
        * ``length``: mean tokens of a row;
        * ``flops``: of the model in zotune's step on these rows, also where the official procedure takes more;
        * ``peak_flops_per_s``: best matrix product, measured right after the steps;
        * ``peak_bytes``: of the process while it stepped, or of the GPU's allocator;
        * ``parameters``, ``startup_s``, ``repeats``.
    """
    taken, device = side.steps, side.steps.device
    taken.setting = replace(taken.setting, batch_size=case["batch_size"])
    forget_peak(device)
    timed = range(1, 1 + repeats)
    for number in _warm_up(taken, timed):
        taken.step(number)
    before = taken.timings
    spent = [seconds(partial(taken.step, number), device) for number in timed]
    phases = {name: (value - before[name]) / repeats for name, value in taken.timings.items()}
    fold = fold_seconds(taken)
    batches = [taken.setting.batch(number) for number in timed]
    tokens = mean(sum(example.row.n_tokens for example in batch) for batch in batches)
    return {
        "step_s": median(spent) + fold / side.method.interval,
        "best_s": min(spent),
        "worst_s": max(spent),
        "fold_s": fold,
        "phases_s": phases,
        "tokens": mean(map(taken.tokens, batches)),
        "length": tokens / case["batch_size"],
        "flops": mean(map(taken.flops, batches)),
        "parameters": shapes.parameters(case["model"]),
        "peak_flops_per_s": work.matmul_peak(product_dtype(taken.setting.model.dtype, device.type), device),
        "peak_bytes": peak_bytes(device),
        "startup_s": side.startup_s,
        "repeats": repeats,
    }


def _warm_up(taken: sides.Steps, timed: range) -> list[int]:
    """Batches to step on first: on a GPU twice those that are timed, after which each has its graph."""
    if taken.device.type == "cuda" and isinstance(taken, Stepper):
        return [*timed, *timed]
    return [0] if taken.device.type == "cpu" else [0, timed[0]]
