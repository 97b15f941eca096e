"""Pictures of several runs over each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from zotune.config import Config
from zotune.errors import ConfigError, listed, unknown
from zotune.journal.branches import open_run
from zotune.paths import StrPath, expand
from zotune.presets import resolve
from zotune.watching import metrics
from zotune.watching.differences import labels, values
from zotune.watching.metrics import RunMetrics, number, smoothed
from zotune.watching.plots import INK, in_percent, panels, save, score_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette for all kinds of colour vision, without its yellow, which is faint on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = ("-", "--", ":", "-.")


Axis = Literal["steps", "seconds", "forwards"]
"""What runs are laid over each other by."""


@dataclass(frozen=True)
class Curves:
    """A run, as an overlay shows it.

    Attributes:
        label: Its legend.
        metrics: What it recorded.
        at: Place on the x axis of a number of finished steps.
    """

    label: str
    metrics: RunMetrics
    at: Callable[[int], float]


def overlay(runs: Sequence[StrPath], out: StrPath, x: Axis = "steps") -> Path:
    """Draw several runs over each other: smoothed training loss, validation loss, and score where they have one.

    The legends name what differs between the runs' configurations.

    Args:
        runs: Run directories.
        out: The picture; its ending says in which format, e.g. ``.png``, ``.svg`` or ``.pdf``.
        x: What the x axis counts: steps, seconds of training (evaluations left out), or forwards (probes scored).

    Raises:
        JournalError: One of them is no run or has nothing to show.
        ConfigError: The picture cannot be written, or in no such format.
    """
    if x not in get_args(Axis):
        raise ConfigError(unknown("x axis", x, get_args(Axis)))
    return save(draw(_curves([expand(run) for run in listed(runs, "runs")], x), x), expand(out))


def draw(curves: Sequence[Curves], x: str = "steps") -> Figure:
    """The figure of several runs."""
    names = [each.metrics.score_name for each in curves]
    score = next((name for name in names if name), None)
    judged = {"loss": "validation loss", **({score: score_label(score)} if score else {})}
    figure, axes = panels(1 + len(judged))
    for place, each in enumerate(curves):
        style: dict[str, Any] = {
            "color": PALETTE[place % len(PALETTE)],
            "linestyle": DASHES[place // len(PALETTE) % len(DASHES)],
        }
        steps = [record["step"] for record in each.metrics.steps]
        losses = smoothed(record["loss"] for record in each.metrics.steps)
        axes[0].plot([each.at(step) for step in steps], losses, linewidth=1.8, **style)
        for panel, key in zip(axes[1:], judged, strict=True):
            places = [each.at(record["step"]) for record in each.metrics.evaluations]
            heights = [number(record.get(key)) for record in each.metrics.evaluations]
            panel.plot(places, heights, marker="o", markersize=4, linewidth=1.8, **style)
    for panel, label in zip(axes, ("training loss, smoothed", *judged.values()), strict=True):
        panel.set_ylabel(label)
        panel.set_xlabel({"steps": "step", "seconds": "seconds of training"}.get(x, x))
    if score:
        in_percent(axes[2])
    legend = figure.legend(
        handles=axes[0].get_lines(),
        labels=[each.label for each in curves],
        loc="outside lower center",
        ncols=min(3, len(curves)),
        frameon=False,
        labelcolor=INK,
        fontsize=10,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _curves(runs: Sequence[Path], x: Axis) -> list[Curves]:
    configurations = [open_run(run)[1] for run in runs]
    recorded = [metrics.read(run) for run in runs]
    legends = labels(_names(runs), [values(config) for config in configurations])
    return [
        Curves(legend, each, _scale(x, each, config))
        for legend, each, config in zip(legends, recorded, configurations, strict=True)
    ]


def _names(runs: Sequence[Path]) -> list[str]:
    """The directories' names, or their whole paths where two are called the same."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _scale(x: Axis, run: RunMetrics, config: Config) -> Callable[[int], float]:
    """See `Curves.at`."""
    if x == "seconds":
        return run.clock()
    each = resolve(config.method).probes if x == "forwards" else 1
    return lambda step: float(each * step)
