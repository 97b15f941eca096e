"""The report's section on ``zotune bench scaling``: steps against the official one, and what they grow with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from zotune.bench.fits import Line, fit
from zotune.bench.report.section import Section, device, grouped, sound, table
from zotune.bench.results import Result
from zotune.bench.sides import OFFICIAL, SIDES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STEPS = (
    "Milliseconds per step: the median, with a fold's share. In brackets: times faster than the official step at the "
    "same batch size (times the directions, since it takes one), and share of the best matrix product measured here. "
    "Sides with other numbers of timed steps have had other batches, whose rows may be longer or shorter on average."
)
_TOKENS = (
    "Steps against the tokens that they compute (batch x length x probes), all batches and directions together: slope, "
    "and what does not grow, as time and as a share of a step of 16 examples and one direction; the aim is at most "
    "10 %. The line has the least relative distances from the points; the error is the largest of them."
)
_PARAMETERS = "Steps against parameters, the sizes of a family together."
_BATCH = 16
_METHOD = ("scope", "rank", "directions")


def render(results: Sequence[Result]) -> Section:
    """Tables by machine and dtype: steps, and the lines through them."""
    found = sorted(sound(results), key=_order)
    groups = grouped(found, lambda result: (device(result), result.case["dtype"], result.case["threads"]))
    parts, pictures = [], {}
    for number, ((where, dtype, threads), members) in enumerate(groups.items(), 1):
        peak = max(result.figures["peak_flops_per_s"] for result in members)
        title = f"### {where}, {dtype}, {threads} CPU threads; best matrix product {peak / 1e12:.3g} TFLOP/s"
        parts += [title, _STEPS, _steps(members, peak)]
        parts += _titled(_TOKENS, _token_lines(members)) + _titled(_PARAMETERS, _parameter_lines(members))
        pictures[f"scaling-{number}"] = lambda members=members: _draw(members)
    return Section.on(results, "Scaling", *parts, pictures=pictures)


def _titled(note: str, lines: str) -> list[str]:
    return [note, lines] if lines else []


def _order(result: Result) -> tuple[Any, ...]:
    case = result.case
    method = tuple(case.get(name, "") for name in _METHOD) if case["runtime"] != OFFICIAL else ()
    return result.figures["parameters"], SIDES.index(case["runtime"]), method, case["batch_size"]


def _steps(results: Sequence[Result], peak: float) -> str:
    """A line per model, method and batch, a column per side; the official side's only where nothing else is."""
    sides = [side for side in SIDES if any(result.case["runtime"] == side for result in results)]
    official = {_place(result): result for result in results if result.case["runtime"] == OFFICIAL}
    lines = grouped(results, lambda result: (*_place(result), *(result.case.get(name, "") for name in _METHOD)))
    compared = {key[:2] for key, members in lines.items() if members[0].case["runtime"] != OFFICIAL}
    rows = []
    for (model, batch, *method), members in lines.items():
        theirs = official.get((model, batch))
        if members == [theirs] and (model, batch) in compared:
            continue
        shown = {result.case["runtime"]: _shown(result, theirs, peak) for result in members}
        if theirs is not None:
            shown[OFFICIAL] = _shown(theirs, theirs, peak)
        rows.append([model, *method, batch, *(shown.get(side, "") for side in sides)])
    return table(["model", "scope", "rank", "directions", "batch", *(f"{side}, ms" for side in sides)], rows, words=2)


def _place(result: Result) -> tuple[str, int]:
    return result.case["model"], result.case["batch_size"]


def _shown(result: Result, official: Result | None, peak: float) -> str:
    step = result.figures["step_s"]
    if result is official:
        return f"{1e3 * step:.1f}"
    share = f"{result.figures['flops'] / step / peak:.0%}"
    if official is None:
        return f"{1e3 * step:.1f} ({share})"
    return f"{1e3 * step:.1f} ({result.case['directions'] * official.figures['step_s'] / step:.2f}x, {share})"


def _token_lines(results: Sequence[Result]) -> str:
    rows = []
    for key, members in grouped(results, _but("batch_size", "directions")).items():
        line = _line(members, "tokens")
        if line is not None:
            share = f"{line.intercept_share(_BATCH * mean(map(_tokens_per_example, members))):.1%}"
            slope, intercept = f"{1e6 * line.slope:.4g}", f"{1e3 * line.intercept:.3g}"
            rows.append([*key, line.points, slope, intercept, share, _error(line)])
    headings = ["model", "runtime", "scope", "rank", "points", "µs per token", "intercept, ms", "of batch 16", "error"]
    return table(headings, rows, words=3) if rows else ""


def _tokens_per_example(result: Result) -> float:
    return float(result.figures["tokens"]) / (result.case["batch_size"] * result.case.get("directions", 1))


def _parameter_lines(results: Sequence[Result]) -> str:
    rows = []
    for key, members in grouped(results, lambda result: (_family(result), *_but("model")(result))).items():
        line = _line(members, "parameters")
        if line is not None:
            slope, intercept = f"{1e12 * line.slope:.4g}", f"{1e3 * line.intercept:.3g}"
            rows.append([*key, line.points, slope, intercept, _error(line)])
    settings = ["family", "runtime", "scope", "rank", "directions", "batch"]
    headings = [*settings, "points", "ms per 10⁹ parameters", "intercept, ms", "error"]
    return table(headings, rows, words=3) if rows else ""


def _family(result: Result) -> str:
    return str(result.case["model"]).partition("-")[0]


def _error(line: Line) -> str:
    """Empty where the points cannot tell."""
    return f"{line.apart:.1%}" if line.points > 2 else ""


def _but(*left_out: str) -> Callable[[Result], tuple[Any, ...]]:
    """A case's settings without these; empty for what the official procedure has not."""
    names = [name for name in ("model", "runtime", *_METHOD, "batch_size") if name not in left_out]
    return lambda result: tuple(result.case.get(name, "") for name in names)


def _line(results: Sequence[Result], figure: str) -> Line | None:
    return fit([r.figures[figure] for r in results], [r.figures["step_s"] for r in results])


def _draw(results: Sequence[Result]) -> Figure:
    """Steps against tokens, a line per model and side; and against parameters, at the batch that most models have."""
    from zotune.watching.plots import INK, panels

    by_batch = grouped(results, lambda result: (result.case["batch_size"], result.case.get("directions", 1)))
    models = {size: len({result.case["model"] for result in members}) for size, members in by_batch.items()}
    size = max(models, key=lambda size: (models[size], size))
    figure, axes = panels(2 if models[size] > 1 else 1)
    _draw_steps(axes[0], results, "tokens", _but("batch_size", "directions"))
    axes[0].set_xlabel("tokens computed in a step", color=INK)
    if models[size] > 1:
        _draw_steps(axes[1], by_batch[size], "parameters", lambda result: (_family(result), *_but("model")(result)))
        axes[1].set_xlabel(f"parameters, at batch {size[0]}", color=INK)
    return figure


def _draw_steps(axes: Axes, results: Sequence[Result], figure: str, key: Callable[[Result], Any]) -> None:
    """Points, and the fitted lines through them."""
    from matplotlib.ticker import LogFormatter

    from zotune.watching.overlays import PALETTE
    from zotune.watching.plots import INK

    colours = dict(zip(SIDES, PALETTE, strict=False))
    axes.set_xscale("log")
    axes.set_yscale("log")
    for members in grouped(results, key).values():
        colour = colours[members[0].case["runtime"]]
        xs = [result.figures[figure] for result in members]
        axes.plot(xs, [1e3 * result.figures["step_s"] for result in members], "o", markersize=4, color=colour)
        if (line := _line(members, figure)) is not None:
            ends = np.geomspace(min(xs), max(xs))
            axes.plot(ends, 1e3 * line.at(ends), color=colour, linewidth=1.2)
    for side in (side for side in SIDES if any(result.case["runtime"] == side for result in results)):
        axes.plot([], [], "o-", color=colours[side], label=side)
    for axis in (axes.xaxis, axes.yaxis):
        for choose in (axis.set_major_formatter, axis.set_minor_formatter):
            choose(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
    axes.tick_params(which="both", colors=INK, labelsize=10)
    axes.set_ylabel("milliseconds per step", color=INK)
    axes.legend(frameon=False, labelcolor=INK, fontsize=10)
