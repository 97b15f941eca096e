"""Results of a kind that has no renderer of its own: a table of what there is."""

from __future__ import annotations

from collections.abc import Sequence

from zotune.bench.report.section import Section, sound, table
from zotune.bench.results import Result


def render(results: Sequence[Result]) -> Section:
    """A line per case, with its figures that are numbers or words."""
    found = sound(results)
    settings = list(dict.fromkeys(name for result in found for name in result.case))
    figures = list(dict.fromkeys(name for result in found for name, value in result.figures.items() if _shows(value)))
    rows = [
        [*(result.case.get(name, "") for name in settings), *(_shown(result.figures.get(name)) for name in figures)]
        for result in found
    ]
    listed = table([*settings, *figures], rows, words=len(settings)) if rows else ""
    return Section.on(results, results[0].kind.capitalize(), listed)


def _shows(value: object) -> bool:
    return isinstance(value, int | float | str)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value) if _shows(value) else ""
