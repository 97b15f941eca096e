"""The picture of a run: loss and score over the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zotune.errors import ConfigError, unknown
from zotune.figures import percent
from zotune.paths import StrPath, expand
from zotune.reporters import Record
from zotune.watching import metrics
from zotune.watching.metrics import RunMetrics, number, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#2b2d42"
MUTED = "#8d99ae"
LOSS = "#3a6ea5"
EVALUATION = "#d1495b"
SCORE = "#2a9d8f"


def plot(run: StrPath, out: StrPath | None = None) -> Path:
    """Draw the picture of a run from its ``metrics.jsonl``.

    Args:
        run: The run directory.
        out: The picture; its ending says in which format. Default: ``curves.png`` in the run directory.

    Raises:
        JournalError: There are no metrics, or a line of them is damaged.
        ConfigError: The picture cannot be written, or in no such format.
    """
    folder = expand(run)
    picture = folder / "curves.png" if out is None else expand(out)
    return save(draw(metrics.read(folder), title=folder.resolve().name), picture)


def draw(run: RunMetrics, title: str) -> Figure:
    """The figure of one run: loss, and beside it the score where the evaluations have one."""
    figure, axes = panels(2 if run.score_name else 1)
    figure.suptitle(title, color=INK, fontsize=14, fontweight="bold", parse_math=False)
    draw_loss(axes[0], run)
    if run.score_name:
        draw_score(axes[1], run, run.score_name)
    return figure


def draw_loss(axes: Axes, run: RunMetrics) -> None:
    """Loss of each batch, smoothed, and on the validation rows."""
    if run.steps:
        draw_steps(axes, run, lambda record: record["loss"])
    if run.evaluations:
        axes.plot(
            [record["step"] for record in run.evaluations],
            [number(record["loss"]) for record in run.evaluations],
            color=EVALUATION, marker="o", markersize=5, linewidth=1.5, label="validation",
        )  # fmt: skip
    axes.set_ylabel("loss")
    axes.legend(frameon=False, labelcolor=INK, fontsize=10)


def draw_steps(axes: Axes, run: RunMetrics, figure: Callable[[Record], float | None]) -> None:
    """A figure of each step, and its moving average."""
    steps = [record["step"] for record in run.steps]
    heights = [figure(record) for record in run.steps]
    axes.plot(steps, list(map(number, heights)), color=LOSS, alpha=0.25, linewidth=0.9, label="batch")
    axes.plot(steps, smoothed(heights), color=LOSS, linewidth=2, label="batch, smoothed")


def draw_score(axes: Axes, run: RunMetrics, name: str) -> None:
    """Accuracy, or what stands for it, on the validation rows."""
    known = [record for record in run.evaluations if record.get(name) is not None]
    steps = [record["step"] for record in known]
    shares = [record[name] for record in known]
    axes.plot(steps, shares, color=SCORE, marker="o", markersize=5, linewidth=2)
    _annotate(axes, steps[-1], shares[-1], above=True)
    if len(steps) > 1:
        # Away from the curve, which leaves the first point upwards when all goes well.
        _annotate(axes, steps[0], shares[0], above=shares[0] > shares[1])
    axes.margins(x=0.12, y=0.15)
    in_percent(axes)
    axes.set_ylabel(score_label(name))


def style(axes: Axes) -> None:
    """The look that all panels share."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=10)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=11)


def panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    """An empty figure with panels side by side."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(
        figsize=(6 * count if count < 3 else 15, 4.2),
        layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1, wspace=0.04),
    )
    axes = figure.subplots(1, count, squeeze=False)[0]
    for each in axes:
        style(each)
    return figure, axes


def save(figure: Figure, out: Path) -> Path:
    """Write a figure in the format that the ending of ``out`` names.

    Raises:
        ConfigError: It cannot be written, or there is no such format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    formats = FigureCanvasAgg(figure).get_supported_filetypes()
    if out.suffix.lstrip(".").lower() not in formats:
        raise ConfigError(unknown("picture format", out.suffix, (f".{name}" for name in formats)))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise ConfigError(f"cannot write the picture {out}: {error.strerror or error}") from error
    return out


def score_label(name: str) -> str:
    """An axis' label for a score."""
    return f"validation {name.replace('_', ' ')}"


def in_percent(axes: Axes) -> None:
    """Label the y axis' shares in percent."""
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def _annotate(axes: Axes, step: int, share: float, *, above: bool) -> None:
    axes.annotate(
        percent(share), (step, share), xytext=(0, 10 if above else -10), textcoords="offset points",
        ha="center", va="bottom" if above else "top", color=INK, fontsize=10, fontweight="bold",
    )  # fmt: skip
