"""Long benchmarks: case after case, each kept as it comes, with progress and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from zotune.bench.results import Case, Result, Results, told
from zotune.errors import ZotuneError, reason
from zotune.figures import counted, duration

Figures = Mapping[str, Any]


class TimeIsUp(Exception):
    """Raised by what measures: the time is up within a case, which stays without a result."""


def run(
    results: Results,
    cases: Sequence[Case],
    measure: Callable[[Case], Figures],
    *,
    console: Console,
    cost: Callable[[Case], float] = lambda case: 1.0,
    retry: bool = False,
    minutes: float = float("inf"),
) -> list[Result]:
    """Measure what has no result yet, in order.

    A case that cannot be measured (the model is not tunable so, memory does not suffice) is a result too, with
    ``error`` as its only figure; the others go on.

    Args:
        results: Where results are and go.
        cases: What to measure.
        measure: Gives the figures of a case.
        console: Told of every case in one line.
        cost: About how long a case takes compared with the others; the time left follows from it.
        retry: Measure again what failed.
        minutes: Begin no case after so long; ``measure`` may raise `TimeIsUp` from one that takes longer.

    Returns:
        The results of those of ``cases`` that have one now.
    """
    missing = [case for case in cases if _is_missing(results.find(case), retry)]
    if len(missing) < len(cases):
        console.print(f"{len(cases) - len(missing)} of {counted(len(cases), 'case')} measured already")
    began, spent, left = time.monotonic(), 0.0, sum(map(cost, missing))
    for number, case in enumerate(missing, 1):
        try:
            if time.monotonic() - began >= 60 * minutes:
                raise TimeIsUp
            result = results.add(case, _figures(measure, case))
        except TimeIsUp:
            console.print(f"the time is up with {counted(len(missing) - number + 1, 'case')} left: call again to go on")
            break
        spent, left = spent + cost(case), left - cost(case)
        seconds = (time.monotonic() - began) * left / spent
        console.print(
            f"{number}/{len(missing)} {_line(result)}  {duration(seconds)} left", highlight=False, soft_wrap=True
        )
    found = [results.find(case) for case in cases]
    return [result for result in found if result is not None]


def _is_missing(result: Result | None, retry: bool) -> bool:
    return result is None or (retry and "error" in result.figures)


def _figures(measure: Callable[[Case], Figures], case: Case) -> Figures:
    try:
        return measure(case)
    # PyTorch reports a lack of memory as a RuntimeError, on a GPU and on a CPU.
    except (ZotuneError, RuntimeError, MemoryError) as error:
        return {"error": reason(error)}


def _line(result: Result) -> str:
    named = told(result.case)
    if "error" in result.figures:
        return f"{named}: failed: {result.figures['error']}"
    shown = [f"{name} {value:.4g}" for name, value in result.figures.items() if isinstance(value, float)]
    return f"{named}: {', '.join(shown[:3])}"
