"""Commands that look and change nothing: ``eval``, ``plot`` and ``presets``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from zotune.cli.program import AsJson, RunPath, app, plain_console, plain_table, print_json
from zotune.figures import counted, percent

if TYPE_CHECKING:
    from zotune.presets import Preset


class XAxis(Enum):
    """What the x axis of an overlay counts."""

    STEPS = "steps"
    SECONDS = "seconds"
    FORWARDS = "forwards"


@app.command("eval")
def evaluate(
    path: RunPath,
    best: Annotated[bool, typer.Option("--best", help="Those of the lowest validation loss on record.")] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate the newest weights of a run on its validation rows."""
    from zotune.train import evaluate_run

    metrics = evaluate_run(path, best)
    if as_json:
        print_json({"run": str(path), **asdict(metrics)})
    else:
        shares = "".join(f"  {name} {percent(share)}" for name, share in metrics.shares.items())
        typer.echo(f"loss {metrics.loss:.3f}{shares}  on {counted(metrics.examples, 'validation row')}")


@app.command()
def plot(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Picture, .png, .svg or .pdf. Default: RUN/curves.png, or overlay.png for several runs or another --x."
        ),
    ] = None,
    x: Annotated[XAxis, typer.Option("--x", help="What the x axis counts.")] = XAxis.STEPS,
    as_json: AsJson = False,
) -> None:
    """Draw loss and accuracy of a run, or of several over each other."""
    if len(paths) == 1 and x is XAxis.STEPS:
        from zotune.watching.plots import plot as draw

        picture = draw(paths[0], out)
    else:
        from zotune.watching.overlays import overlay

        picture = overlay(paths, out or Path("overlay.png"), x.value)
    if as_json:
        which = {"run": str(paths[0])} if len(paths) == 1 else {"runs": [str(path) for path in paths]}
        print_json(which | {"plot": str(picture)})
    else:
        typer.echo(picture)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show all about this one.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, with their sources and defaults."""
    from zotune.presets import PRESETS, get

    if name is not None:
        preset = get(name)
        typer.echo(json.dumps(asdict(preset)) if as_json else _describe(preset))
    elif as_json:
        typer.echo(json.dumps([asdict(preset) for preset in PRESETS.values()]))
    else:
        plain_console().print(_table(PRESETS.values()))


def _table(listed: Iterable[Preset]) -> Table:
    table = plain_table("preset", "what it does", "main defaults", "source", below=1)
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    for preset in listed:
        values = _defaults(preset)
        shown = [f"{key} = {values[key]}" for key in ("lr", "eps", "rank", "interval", "momentum") if values.get(key)]
        table.add_row(preset.name, preset.summary, "\n".join(shown), preset.citation)
    return table


def _describe(preset: Preset) -> str:
    return "\n".join(
        (
            f"{preset.name}: {preset.summary}",
            f"source: {preset.citation}",
            "defaults:",
            *(f"  {key} = {value}" for key, value in _defaults(preset).items()),
            "deviations from the published method:",
            *(f"  {line}" for line in preset.deviations or ("none",)),
        )
    )


def _defaults(preset: Preset) -> dict[str, Any]:
    """What a run has of this preset where nothing else is set: values that have a meaning for it."""
    from zotune.config import AUTO
    from zotune.presets import unused

    values = asdict(preset.method)
    values["lr"] = f"{AUTO} (published: {preset.method.lr:g})" if preset.lr_published else AUTO
    hidden = {*unused(preset)} | (set() if values["family"] == "low-rank" else {"normalised", "momentum"})
    return {key: value for key, value in values.items() if key not in hidden}
