"""A section of a report, and what all sections are put together from."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zotune.bench.results import Result, told

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Section:
    """What one kind of results comes to.

    Attributes:
        title: Its heading.
        markdown: Its text, with headings from ``###`` on.
        pictures: By file name without an ending, what draws them; each may take a while.
    """

    title: str
    markdown: str
    pictures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)

    @classmethod
    def on(
        cls,
        results: Sequence[Result],
        title: str,
        *parts: str,
        pictures: Mapping[str, Callable[[], Figure]] | None = None,
    ) -> Section:
        """A section of these parts, which ends in what of the results failed and in where they were measured."""
        return cls(title, paragraphs(*parts, _failures(results), _provenance(results)), pictures or {})


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, words: int = 1) -> str:
    """A Markdown table.

    Args:
        headings: Of the columns.
        rows: What they hold.
        words: Columns from the left that hold words; the others are numbers, and stand at the right.
    """
    lines = [headings, ["---" if column < words else "---:" for column in range(len(headings))], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def paragraphs(*parts: str) -> str:
    """Parts with an empty line between them; empty ones are left out."""
    return "\n\n".join(part for part in parts if part)


def grouped(results: Iterable[Result], key: Callable[[Result], Any]) -> dict[Any, list[Result]]:
    """Results by a key, in the order in which the keys come."""
    found: dict[Any, list[Result]] = {}
    for result in results:
        found.setdefault(key(result), []).append(result)
    return found


def sound(results: Iterable[Result]) -> list[Result]:
    """Those that were measured."""
    return [result for result in results if "error" not in result.figures]


def device(result: Result) -> str:
    """The GPU, or where there is none the processor."""
    return str(result.machine.get("gpu") or result.machine.get("cpu"))


def _failures(results: Iterable[Result]) -> str:
    """A list of the cases that could not be measured, and why."""
    failed = [result for result in results if "error" in result.figures]
    lines = [f"- {told(result.case)}: {result.figures['error']}" for result in failed]
    return paragraphs("Not measured:", "\n".join(lines)) if lines else ""


def _provenance(results: Sequence[Result]) -> str:
    """A list of where, when, with what and by which commands the results were measured."""
    lines = []
    for about, members in grouped(results, _made_with).items():
        dates = sorted(str(result.machine.get("date", ""))[:10] for result in members)
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        commands = dict.fromkeys(_command(result.machine.get("command", ())) for result in members)
        lines.append(f"- {about}; {when}; {', '.join(f'`{command}`' for command in commands)}")
    return paragraphs("Measured with:", "\n".join(lines))


def _made_with(result: Result) -> str:
    machine = result.machine
    versions = ", ".join(f"{name} {value}" for name, value in machine.get("versions", {}).items() if value)
    cores = "" if machine.get("gpu") else f", {machine.get('cores')} cores"
    return f"{device(result)}{cores}; {versions}; commit {machine.get('commit') or 'unknown'}"


def _command(words: Sequence[str]) -> str:
    return shlex.join([Path(words[0]).name, *words[1:]]) if words else "unknown"
