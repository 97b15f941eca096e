"""``zotune bench overhead``: where the time of a step goes, by phase and by runtime.

What is timed is `zotune.train.take_step` itself, on a real journal in a temporary folder, with clocks around its parts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from zotune.bench import apart, sides, work
from zotune.bench.clocks import Clocked, ModelClock, Stopwatch
from zotune.bench.plan import Plan
from zotune.bench.results import Case, Result, Results
from zotune.bench.sides import OFFICIAL
from zotune.bench.steps import Stepper
from zotune.bench.turns import fold_seconds, seconds
from zotune.config import Config, DataConfig, ModelConfig
from zotune.data import BatchOrder
from zotune.errors import ConfigError
from zotune.journal import Journal
from zotune.objectives import Objective
from zotune.optimizer import Optimizer
from zotune.runtimes.base import Runtime
from zotune.session import Session
from zotune.train import take_step

KIND = "overhead"

PHASES = ("draw", "pack", "forward", "head", "loss", "rpc", "update", "fold", "journal", "other")
"""Parts of a step, in its order.

``rpc`` is what calls of the runtime take beyond its phases, for an engine the way there and back; ``other`` is the
driver: the batch, ask and tell.
"""

_WARM_UP = 3


def overhead(
    wanted: Plan,
    folder: Path,
    *,
    repeats: int = 20,
    minutes: float = float("inf"),
    retry: bool = False,
    console: Console | None = None,
) -> list[Result]:
    """Split the steps of every case that has no result in the folder yet.

    Args:
        wanted: The cases; the official procedure has no such parts.
        folder: As for `zotune.bench.scaling`, like all that follow.
        repeats: Steps to take of each case.
        minutes: See there.
        retry: See there.
        console: See there.

    Raises:
        ConfigError: The official procedure is among the runtimes.
        DataError: A result in the folder is damaged.
    """
    if OFFICIAL in wanted.runtimes:
        raise ConfigError("the official procedure is one loop without such parts; leave official out of --runtimes")
    act = partial(measure, repeats=repeats)
    # A process each, because a fold leaves the window that a new journal begins with.
    results = Results(folder, KIND)
    return apart.run(results, wanted, _start, act, alone=True, minutes=minutes, retry=retry, console=console)


def _start(case: Case) -> sides.Side:
    return sides.start(case, [case["batch_size"]])


def measure(side: sides.Side, case: Case, repeats: int) -> Mapping[str, Any]:
    """The figures of a case.

    Returns:
        * ``step_s``: mean of a whole step, with a 1/interval share of the fold;
        * ``host_s``: of a step, what the host takes until the forward is launched, and after its scores are there; None
          on a CPU, where nothing is launched;
        * ``hidden_s``: what it does for the next step in between, while the device works; None on a CPU;
        * ``phases_s``: mean seconds of each of `PHASES`; they sum to ``step_s``. On a GPU the embedded runtime is made
          to wait between phases, and an engine is not: there the head has what the device is late with;
        * ``repeats``.
    """
    stepper = cast("Stepper", side.steps)
    step_s, phases = split(stepper, repeats, waits=True)
    host_s, hidden_s = host_seconds(stepper, repeats) if stepper.device.type == "cuda" else (None, None)
    fold = fold_seconds(stepper) / side.method.interval
    return {
        "step_s": step_s + fold,
        "host_s": host_s,
        "hidden_s": hidden_s,
        "phases_s": {name: fold if name == "fold" else phases[name] for name in PHASES},
        "repeats": repeats,
    }


def host_seconds(stepper: Stepper, repeats: int) -> tuple[float, float]:
    """Mean seconds of a step in which the device waits for the host, and in which the host works beside it.

    The device works, in the embedded runtime, from when the forward is launched until the scores are read. An engine's
    head, which ends in waiting, is left out whole.
    """
    step_s, phases = split(stepper, repeats, waits=False)
    return step_s - phases["waiting"] - phases["hidden"], phases["hidden"]


def split(stepper: Stepper, repeats: int, *, waits: bool) -> tuple[float, dict[str, float]]:
    """Mean seconds of a step without its fold, and of its phases; ``waiting`` and ``hidden`` are part of them.

    Args:
        stepper: In its first window.
        repeats: Steps to take, after some that are not timed: three, and on a GPU twice all of them, after which each
            has its graph.
        waits: Whether to wait for a GPU after a step, and between the phases of the embedded runtime.
    """
    clock, stopwatch = ModelClock(stepper.setting.model, stepper.device, waits=waits), Stopwatch()
    warm_up = 2 * repeats if stepper.device.type == "cuda" else _WARM_UP
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        session = _session(stepper, stopwatch, repeats)
        journal = Journal.create(folder / "journal.jsonl", session.header())
        stack.enter_context(closing(journal))
        step = partial(take_step, session, journal=cast("Journal", Clocked(journal, stopwatch, append="journal")))
        for number in range(warm_up):
            step(number)
        stopwatch.seconds.clear()
        before = stepper.timings
        with clock:
            taken = seconds if waits else _seconds_of_the_host
            total = sum(taken(partial(step, warm_up + number), stepper.device) for number in range(repeats))
        runtime = {name: value - before[name] for name, value in stepper.timings.items()}
    phases = _phases(total, stopwatch.seconds, runtime, clock)
    return total / repeats, {name: value / repeats for name, value in phases.items()}


def _seconds_of_the_host(act: Callable[[], object], device: torch.device) -> float:
    """How long a call takes that begins with the device at rest and may leave it at work."""
    start = work.clock(device)
    act()
    return time.perf_counter() - start


def _phases(
    total: float, spent: Mapping[str, float], runtime: Mapping[str, float], clock: ModelClock
) -> dict[str, float]:
    """What a step's clocks come to, in seconds.

    Args:
        total: Of all steps.
        spent: In calls of the runtime, the objective and the journal.
        runtime: By the runtime's own phases.
        clock: Of the model's forwards; it sees none of an engine's, which has a phase ``head`` of its own.
    """
    beside = runtime.get("ahead", 0.0)
    found = {
        "draw": runtime["draw"] + clock.before,
        "pack": runtime["pack"],
        "forward": runtime["forward"] + beside + runtime.get("read", 0.0) - clock.before - clock.head,
        "head": runtime.get("head", 0.0) + clock.head,
        "loss": spent["loss"],
        "rpc": spent["score"] + spent["apply"] - sum(runtime.values()),
        "update": runtime["apply"],
        "journal": spent["journal"],
    }
    found["other"] = total - sum(found.values())
    return found | {"waiting": runtime["read"] if "read" in runtime else runtime["head"], "hidden": beside}


@dataclass(frozen=True)
class _Repeating(BatchOrder):
    """The same few batches over and over."""

    every: int = 1

    def indices(self, step: int) -> tuple[int, ...]:
        return super().indices(step % self.every)


def _session(stepper: Stepper, stopwatch: Stopwatch, batches: int) -> Session:
    """The stepper's parts as the training loop takes them, with clocks around runtime and objective."""
    data, method = stepper.setting.dataset, stepper.optimizer.method
    config = Config(
        output="unused", model=ModelConfig(path="random weights"), data=DataConfig(train="random rows", prompt="")
    )
    return Session(
        config,
        # The fold is timed by itself, so no window ends in the steps.
        Optimizer(replace(method, interval=10**9), 10**9),
        cast("Runtime", Clocked(stepper.runtime, stopwatch, score="score", apply="apply")),
        replace(data, objective=cast("Objective", Clocked(data.objective, stopwatch, losses="loss"))),
        _Repeating(len(data.train), stepper.setting.batch_size, seed=0, every=batches),
    )
