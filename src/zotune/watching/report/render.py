"""From what was gathered to HTML."""

from __future__ import annotations

from pathlib import Path

from zotune.figures import elapsed, percent
from zotune.watching.report.curves import curves
from zotune.watching.report.examples import Changed
from zotune.watching.report.gather import Outcome, Report

SHOWN = 24
"""Examples of a kind on the page; of more, the number is told."""

_TITLES = {
    "righted": "Wrong before, right after",
    "wronged": "Right before, wrong after",
    "flickered": "Changed in between, and back",
}


def render(report: Report) -> str:
    """The page. All text from the run is escaped, whatever it holds."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "elapsed": elapsed}
    drawn = {name: Markup(svg) for name, svg in curves(report.metrics).items()}
    return environment.get_template("page.html").render(
        report=report, curves=drawn, kinds=_kinds(report), shown=SHOWN, figures=[_figure(o) for o in report.outcomes]
    )


def _kinds(report: Report) -> list[tuple[str, tuple[Changed, ...]]]:
    """The changed examples by kind, under its title."""
    if report.changes is None:
        return []
    return [(title, getattr(report.changes, kind)) for kind, title in _TITLES.items()]


def _figure(outcome: Outcome) -> dict[str, object]:
    """An outcome in words."""
    change = outcome.after - outcome.before
    moved = f"{100 * change:+.1f} points" if outcome.share else f"{change:+.3f}"

    def told(value: float) -> str:
        return percent(value) if outcome.share else f"{value:.3f}"

    best, step = outcome.best
    return {
        "name": outcome.name,
        "before": told(outcome.before),
        "after": told(outcome.after),
        "moved": moved.replace("-", "−"),
        "better": outcome.better,
        "best": f"best {told(best)} at step {step}",
    }
