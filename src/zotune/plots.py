"""The picture of a run: loss and accuracy over the steps."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zotune.errors import JournalError
from zotune.progress import Smoothed, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#2b2d42"
MUTED = "#8d99ae"
LOSS = "#3a6ea5"
EVALUATION = "#d1495b"
ACCURACY = "#2a9d8f"


@dataclass(frozen=True)
class Metrics:
    """What ``metrics.jsonl`` holds, ascending by step; of two lines for one step the later counts."""

    steps: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]


def plot(run: Path) -> Path:
    """Draw ``curves.png`` into a run directory from its ``metrics.jsonl``.

    Raises:
        JournalError: There are no metrics, or a line of them is damaged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    metrics = read_metrics(run)
    figure = draw(metrics, title=run.resolve().name)
    FigureCanvasAgg(figure)
    path = run / "curves.png"
    figure.savefig(path, dpi=150)
    return path


def read_metrics(run: Path) -> Metrics:
    """Read ``metrics.jsonl`` of a run directory. A last line without its end, as a killed process leaves, is ignored.

    Raises:
        JournalError: The file is missing or holds no step and no evaluation, or another line is damaged.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise JournalError(f"cannot read the metrics {path}: {error.strerror}; is {run} a run directory?") from error
    kinds: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "eval": {}}
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            kinds[record["kind"]][record["step"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(f"line {number} of {path} is damaged: {line[:60]!r}; remove it to go on") from error
    if not kinds["step"] and not kinds["eval"]:
        raise JournalError(f"{path} holds no step and no evaluation yet, so there is nothing to draw")
    steps, evaluations = (tuple(records[step] for step in sorted(records)) for records in kinds.values())
    return Metrics(steps, evaluations)


def draw(metrics: Metrics, title: str) -> Figure:
    """The figure: loss, and beside it accuracy where the evaluations have one."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    accuracies = [record for record in metrics.evaluations if record["accuracy"] is not None]
    panels = 2 if accuracies else 1
    figure = Figure(figsize=(6 * panels, 4.2), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1, wspace=0.04))
    axes = figure.subplots(1, panels, squeeze=False)[0]
    figure.suptitle(title, color=INK, fontsize=14, fontweight="bold", parse_math=False)
    _draw_loss(axes[0], metrics)
    if accuracies:
        _draw_accuracy(axes[1], accuracies)
    for panel in axes:
        _style(panel)
    return figure


def _draw_loss(axes: Axes, metrics: Metrics) -> None:
    steps = [record["step"] for record in metrics.steps]
    losses = [_number(record["loss"]) for record in metrics.steps]
    average = Smoothed()
    smoothed = [_number(average.add(loss)) for loss in losses]
    if steps:
        axes.plot(steps, losses, color=LOSS, alpha=0.25, linewidth=0.9, label="batch")
        axes.plot(steps, smoothed, color=LOSS, linewidth=2, label="batch, smoothed")
    if metrics.evaluations:
        axes.plot(
            [record["step"] for record in metrics.evaluations],
            [_number(record["loss"]) for record in metrics.evaluations],
            color=EVALUATION, marker="o", markersize=5, linewidth=1.5, label="validation",
        )  # fmt: skip
    axes.set_ylabel("loss")
    axes.legend(frameon=False, labelcolor=INK, fontsize=10)


def _draw_accuracy(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import PercentFormatter

    steps = [record["step"] for record in evaluations]
    shares = [record["accuracy"] for record in evaluations]
    axes.plot(steps, shares, color=ACCURACY, marker="o", markersize=5, linewidth=2)
    _annotate(axes, steps[-1], shares[-1], above=True)
    if len(steps) > 1:
        # Away from the curve, which leaves the first point upwards when all goes well.
        _annotate(axes, steps[0], shares[0], above=shares[0] > shares[1])
    axes.margins(x=0.08, y=0.15)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_ylabel("validation accuracy")


def _annotate(axes: Axes, step: int, share: float, *, above: bool) -> None:
    axes.annotate(
        percent(share), (step, share), xytext=(0, 10 if above else -10), textcoords="offset points",
        ha="center", va="bottom" if above else "top", color=INK, fontsize=10, fontweight="bold",
    )  # fmt: skip


def _style(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=10)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=11)


def _number(value: float | None) -> float:
    """NaN, which leaves a gap in the curve, for what is missing or not finite."""
    return value if value is not None and math.isfinite(value) else math.nan
