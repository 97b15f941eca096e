"""``zotune bench report``: tables and pictures of the results in a folder, one renderer per kind of result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from zotune import durable
from zotune.bench.report import convergence, overhead, parity, plain, scaling, step
from zotune.bench.report.section import Section, grouped, paragraphs
from zotune.bench.results import Result, every
from zotune.errors import ConfigError

Renderer = Callable[[Sequence[Result]], Section]

RENDERERS: dict[str, Renderer] = {
    "step": step.render,
    "scaling": scaling.render,
    "overhead": overhead.render,
    "parity": parity.render,
    "convergence": convergence.render,
}
"""By the kind of the results that they take, in the order of the report. Results of other kinds are listed."""


def sections(results: Sequence[Result]) -> list[Section]:
    """A section for every kind that there is."""
    kinds = grouped(results, lambda result: result.kind)
    order = [*(kind for kind in RENDERERS if kind in kinds), *(kind for kind in kinds if kind not in RENDERERS)]
    return [RENDERERS.get(kind, plain.render)(kinds[kind]) for kind in order]


def markdown(found: Sequence[Section], *, pictures: bool) -> str:
    """The sections as one page.

    Args:
        found: What `sections` gave.
        pictures: Whether it shows the pictures, which lie beside it.
    """
    parts = ["# Benchmarks"]
    for section in found:
        shown = [f"![{name}]({name}.png)" for name in section.pictures] if pictures else []
        parts += [f"## {section.title}", section.markdown, *shown]
    return paragraphs(*parts) + "\n"


def write(folder: Path, out: Path | None = None, notice: Callable[[str], None] = lambda text: None) -> str:
    """Write ``report.md`` and its pictures, ``*.png``.

    Args:
        folder: Of results; those in folders within it count, too.
        out: Where to; default: ``folder``.
        notice: Told of each JSON file that is no result, in one line.

    Returns:
        The text of ``report.md``.

    Raises:
        DataError: The folder is not there, has no results, or one is damaged.
        ConfigError: ``out`` cannot be written to.
    """
    from zotune.watching.plots import save

    found, out = sections(every(folder, notice)), out or folder
    text = markdown(found, pictures=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        durable.replace(out / "report.md", text.encode())
    except OSError as error:
        raise ConfigError(f"cannot write the report to {out}: {error.strerror or error}") from error
    for section in found:
        for name, draw in section.pictures.items():
            save(draw(), out / f"{name}.png")
    return text
