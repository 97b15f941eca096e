"""The report's section on ``zotune bench convergence``: what was learnt over seeds, and the learning curves."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from zotune.bench.curve import Curve, Point, reached, restored
from zotune.bench.report.section import Section, grouped, sound, table
from zotune.bench.results import Result
from zotune.figures import duration
from zotune.watching.metrics import number
from zotune.watching.overlays import PALETTE
from zotune.watching.plots import INK, in_percent, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGETS = (0.7, 0.75, 0.8)
"""Accuracies that are to be reached where nobody says which."""

_HEADINGS = (
    *("method", "seeds", "steps x batch", "loss", "accuracy", "best accuracy"),
    *("row forwards", "tokens", "training"),
)
_NOTE = (
    "Loss and accuracy on the validation rows after the last step, mean and standard deviation over seeds. Row "
    "forwards and tokens are those of training, padding counted; the time is that of the steps."
)


@dataclass(frozen=True)
class Group:
    """Trainings that differ in nothing but the seed.

    Attributes:
        setting: Task, model, dtype and rows to evaluate on: what figures must have in common to be compared.
        method: What learnt.
        batch_size: Examples per step.
        curves: One per seed.
    """

    setting: str
    method: str
    batch_size: int
    curves: tuple[Curve, ...]


def render(results: Sequence[Result], targets: Sequence[float] = TARGETS) -> Section:
    """Tables for each task and model: what was learnt in the end, and what it took to reach accuracies.

    Args:
        results: Of kind ``convergence``.
        targets: Accuracies to reach.
    """
    parts: list[str] = []
    pictures: dict[str, Callable[[], Figure]] = {}
    for setting, alike in _by_setting(results).items():
        parts += [f"### {setting}", _outcomes(alike), _targets(alike, targets)]
        pictures[f"convergence-{re.sub('[^a-z0-9]+', '-', setting.lower())}"] = partial(_draw, alike)
    return Section.on(results, "Convergence", _NOTE, *parts, pictures=pictures)


def record(results: Sequence[Result], targets: Sequence[float] = TARGETS) -> dict[str, Any]:
    """All results as JSON takes them, with the first point of each curve that reaches a target, or null."""
    return {"results": [{**vars(result), "reached": _reached(result, targets)} for result in results]}


def _by_setting(results: Sequence[Result]) -> dict[str, list[Group]]:
    """The trainings that came to an end, seeds put together, in the order of the results."""
    found: dict[str, list[Group]] = {}
    for alike in grouped(sound(results), _but_for_the_seed).values():
        group = _group(alike)
        found.setdefault(group.setting, []).append(group)
    return found


def _group(alike: Sequence[Result]) -> Group:
    case = alike[0].case
    model, data, train = (case["config"][table] for table in ("model", "data", "train"))
    setting = f"{case['task']}, {model['path']}, {model['dtype']}, {data['validation_size']} validation rows"
    curves = tuple(restored(result.figures) for result in alike)
    return Group(setting, case["method"], train["batch_size"], curves)


def _but_for_the_seed(result: Result) -> str:
    case = json.loads(json.dumps(dict(result.case)))
    del case["seed"], case["config"]["train"]["seed"]
    return json.dumps(case, sort_keys=True)


def _reached(result: Result, targets: Sequence[float]) -> dict[str, Any]:
    if "error" in result.figures:
        return {}
    points = {target: reached(restored(result.figures), target) for target in targets}
    return {f"{target:g}": point and asdict(point) for target, point in points.items()}


def _outcomes(found: Sequence[Group]) -> str:
    """What each method had learnt at the end."""
    return table(_HEADINGS, [_outcome(group) for group in found])


def _outcome(group: Group) -> list[str]:
    last = [curve[-1] for curve in group.curves]
    best = [
        max((point.accuracy for point in curve if point.accuracy is not None), default=None) for curve in group.curves
    ]
    return [
        group.method,
        str(len(last)),
        f"{last[0].step} x {group.batch_size}",
        _spread([point.loss for point in last], "{:.3f}".format),
        _spread([point.accuracy for point in last], _percent),
        _spread(best, _percent),
        f"{statistics.fmean(point.rows for point in last):,.0f}",
        f"{statistics.fmean(point.tokens for point in last):,.0f}",
        duration(statistics.fmean(point.seconds for point in last)),
    ]


def _targets(found: Sequence[Group], targets: Sequence[float]) -> str:
    """What it took to reach accuracies, means over the seeds that did."""
    head = ["method", *(f"to {100 * target:.4g} %: steps, row forwards, time" for target in targets)]
    costs = [[_cost([reached(curve, target) for curve in group.curves]) for target in targets] for group in found]
    return table(head, [[group.method, *each] for group, each in zip(found, costs, strict=True)])


def _cost(points: Sequence[Point | None]) -> str:
    there = [point for point in points if point is not None]
    if not there:
        return "not reached"
    steps, rows, seconds = (
        statistics.fmean(each) for each in zip(*((p.step, p.rows, p.seconds) for p in there), strict=True)
    )
    who = "" if len(there) == len(points) else f" ({len(there)} of {len(points)} seeds)"
    return f"{steps:.0f}, {rows:,.0f}, {duration(seconds)}{who}"


def _spread(values: Sequence[float | None], shown: Callable[[float], str]) -> str:
    """Mean and sample standard deviation (n - 1) over seeds."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "not finite"
    mean = shown(statistics.fmean(known))
    return mean if len(known) < 2 else f"{mean} ± {shown(statistics.stdev(known))}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _draw(found: Sequence[Group]) -> Figure:
    """Loss by steps, and accuracy by forwards and by time; a line per seed, a colour per method."""
    figure, axes = panels(3)
    for place, group in enumerate(found):
        style: dict[str, Any] = {"color": PALETTE[place % len(PALETTE)], "marker": "o", "markersize": 4, "alpha": 0.8}
        for number_of_seed, curve in enumerate(group.curves):
            label = None if number_of_seed else group.method
            accuracies = [number(point.accuracy) for point in curve]
            axes[0].plot([point.step for point in curve], [number(point.loss) for point in curve], label=label, **style)
            axes[1].plot([point.rows for point in curve], accuracies, **style)
            axes[2].plot([point.seconds for point in curve], accuracies, **style)
    for panel, x, y in zip(
        axes, ("step", "row forwards", "seconds of training"), ("validation loss", "accuracy", "accuracy"), strict=True
    ):
        panel.set(xlabel=x, ylabel=y)
    for panel in axes[1:]:
        in_percent(panel)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, labelcolor=INK
    )
    return figure
