"""The curves of a report: vector pictures whose colours follow the page's."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from zotune.watching.metrics import RunMetrics
from zotune.watching.plots import EVALUATION, INK, LOSS, MUTED, SCORE, draw_loss, draw_score, draw_steps, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_VARIABLES = {INK: "--ink", MUTED: "--faint", LOSS: "--blue", EVALUATION: "--red", SCORE: "--green"}
_SIZE = (4.7, 3.0)
"""Inches: wide enough for a legend, small enough that its text can be read on a telephone."""


def curves(run: RunMetrics) -> dict[str, str]:
    """SVG elements by what they show, as far as there is something to show."""
    found = {"loss": _svg("loss", lambda axes: draw_loss(axes, run))}
    if name := run.score_name:
        found[name.replace("_", " ")] = _svg(name, lambda axes: draw_score(axes, run, name))
    if run.steps:
        found["speed"] = _svg("speed", lambda axes: _draw_speed(axes, run))
        found["estimate"] = _svg("estimate", lambda axes: _draw_coefficients(axes, run))
    return found


def _draw_speed(axes: Axes, run: RunMetrics) -> None:
    draw_steps(axes, run, lambda record: record["rows_per_s"])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("rows per second")


def _draw_coefficients(axes: Axes, run: RunMetrics) -> None:
    draw_steps(axes, run, lambda record: max(map(abs, record["coefficients"]), default=None))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("largest |coefficient|")


def _svg(name: str, draw: Callable[[Axes], None]) -> str:
    """A panel as an ``<svg>`` element that scales with the page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        style(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    _, _, element = text.getvalue().partition("<svg ")
    opening, end, rest = element.partition(">")
    opening = re.sub(r'(width|height)="[^"]*" ?', "", opening)
    # Names of groups, which would be the same in every picture of the page; nothing refers to them.
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    for colour, variable in _VARIABLES.items():
        rest = rest.replace(colour, f"var({variable})")
    return f'<svg role="img" aria-label="{name} over the steps" {opening}{end}{rest}'
