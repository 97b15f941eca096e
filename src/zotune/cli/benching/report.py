"""``zotune bench report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zotune.cli.benching.program import RESULTS, bench_app
from zotune.cli.program import AsJson, print_json


@bench_app.command("report")
def bench_report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of results.")] = RESULTS,
    out: Annotated[Path | None, typer.Option(help="Folder of report.md and its pictures; default: DIR.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the results in DIR as Markdown tables and pictures, and print the tables."""
    from zotune.bench import report

    text = report.write(folder, out, lambda text: typer.echo(text, err=True))
    if as_json:
        print_json({"results": str(folder), "report": str((out or folder) / "report.md")})
    else:
        typer.echo(text, nl=False)
