"""Commands that watch over runs: ``sweep`` and ``report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from zotune.cli.program import (
    AsJson,
    RunPath,
    app,
    command_line,
    plain_console,
    plain_table,
    print_json,
    told_how_to_go_on,
)
from zotune.figures import duration, percent
from zotune.progress import LastingConsole, TerminalReporter

if TYPE_CHECKING:
    from zotune.watching.sweep import Group, Row, Summary

SOME_FAILED = 1


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Sweep, a TOML file.")],
    summary: Annotated[bool, typer.Option("--summary", help="Only show what is there so far; train nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train several runs that differ in what FILE says, or go on with them, and compare them."""
    from zotune.watching import sweep as sweeps

    plan = sweeps.read(file)
    console = LastingConsole(stderr=as_json)
    failures = None
    if not summary:
        with told_how_to_go_on(lambda: f"; go on with: {command_line('sweep', file)}"):
            failures = sweeps.run(plan, lambda: TerminalReporter(console))
    found = sweeps.summarise(plan, failures)
    if as_json:
        from zotune.watching.sweep.summary import record

        print_json(record(found))
    else:
        _show(found)
    if failures or any(row.state == "diverged" for row in found.rows):
        raise typer.Exit(SOME_FAILED)


@app.command()
def report(
    path: RunPath,
    out: Annotated[Path | None, typer.Option(help="The page. Default: RUN/report.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write all about a run into one HTML page that needs nothing else."""
    from zotune.watching.report import write

    page = write(path, out)
    if as_json:
        print_json({"run": str(path), "report": str(page)})
    else:
        typer.echo(page)


def _show(summary: Summary) -> None:
    console = plain_console()
    if not console.is_terminal:
        # A file has no right edge to cut the table at.
        console.width = 200
    for table in [_runs(summary), *([_groups(summary)] if summary.groups else [])]:
        console.print()
        console.print(table)
    console.print()
    for row in summary.rows:
        if row.reason:
            console.print(f"{row.name} failed: {row.reason}", soft_wrap=True)
    for name, path in (("picture", summary.plot), ("summary", summary.folder / "summary.json")):
        if path is not None:
            console.print(f"{name}   {path}", soft_wrap=True)


def _runs(summary: Summary) -> Table:
    """The runs, best first."""
    from zotune.watching.differences import short_names

    table = plain_table()
    for name in short_names(summary.keys).values():
        table.add_column(name)
    scores = (_score_name(summary), "best") if summary.score else ()
    for name in (*scores, "loss", "best loss", "steps", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for row, settings in zip(summary.rows, _settings(summary.rows, summary.keys), strict=True):
        shares = (_share(row.score), _share(row.best_score)) if summary.score else ()
        figures = (*shares, _loss(row.loss), _loss(row.best_loss), str(row.steps), duration(row.seconds))
        table.add_row(*settings, *figures, row.state)
    return table


def _groups(summary: Summary) -> Table:
    """Mean and standard deviation over seeds."""
    from zotune.watching.differences import short_names
    from zotune.watching.sweep.summary import SEED

    keys = tuple(key for key in summary.keys if key != SEED)
    table = plain_table()
    for name in short_names(keys).values():
        table.add_column(name)
    for name in ("seeds", *((f"{_score_name(summary)}, mean ± std",) if summary.score else ()), "loss, mean ± std"):
        table.add_column(name, justify="right", no_wrap=True)
    for group, settings in zip(summary.groups, _settings(summary.groups, keys), strict=True):
        shares = (_spread(group.score, group.score_std, 100, ".1f", " %"),) if summary.score else ()
        loss = _spread(group.loss, group.loss_std, 1, ".3f", "")
        table.add_row(*settings, str(group.runs), *shares, loss)
    return table


def _settings(rows: Sequence[Row | Group], keys: tuple[str, ...]) -> list[list[str]]:
    """What each row sets, cell by cell."""
    from zotune.watching.differences import shown_apart

    columns = []
    for key in keys:
        told = iter(shown_apart([row.point[key] for row in rows if key in row.point]))
        columns.append([next(told) if key in row.point else "-" for row in rows])
    return [[column[place] for column in columns] for place in range(len(rows))]


def _score_name(summary: Summary) -> str:
    return (summary.score or "").replace("_", " ")


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _spread(mean: float | None, std: float | None, scale: float, digits: str, unit: str) -> str:
    if mean is None:
        return "-"
    spread = "" if std is None else f" ± {scale * std:{digits}}"
    return f"{scale * mean:{digits}}{spread}{unit}"
