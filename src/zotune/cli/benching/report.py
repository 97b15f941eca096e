"""``zotune bench report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zotune.cli.benching.program import RESULTS, bench_app


@bench_app.command("report")
def bench_report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of results.")] = RESULTS,
    out: Annotated[Path | None, typer.Option(help="Folder of report.md and its pictures; default: DIR.")] = None,
) -> None:
    """Write the results in DIR as Markdown tables and pictures, and print the tables."""
    from zotune.bench import report

    typer.echo(report.write(folder, out), nl=False)
