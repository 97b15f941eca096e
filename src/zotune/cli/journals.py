"""``zotune journal``: what happened at a step, whether a journal is sound, where two runs part."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from zotune.cli.program import AsJson, app, command_line, plain_console, plain_table, print_json
from zotune.errors import ConfigError
from zotune.figures import counted, finite

if TYPE_CHECKING:
    from zotune.journal.audit import Difference, Verdict
    from zotune.journal.records import Contents, Entry
    from zotune.optimizer import Optimizer

DIFFERENT = UNSOUND = 1

JournalPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory or journal file.")]

journal_app = typer.Typer(help="Look into the journal of a run.", no_args_is_help=True)
app.add_typer(journal_app, name="journal")


@journal_app.command()
def show(
    path: JournalPath,
    step: Annotated[int | None, typer.Option(min=1, help="Show this step alone.")] = None,
    last: Annotated[int, typer.Option(min=1, help="Show so many steps, the newest ones.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Print the header and the steps; the first step is step 1."""
    from zotune.journal.audit import journal_file
    from zotune.journal.records import read

    contents = read(journal_file(path))
    steps = len(contents.entries)
    if step is not None and step > steps:
        raise ConfigError(f"{path} has {counted(steps, 'step')}; got --step {step}")
    entries = contents.entries[-last:] if step is None else contents.entries[step - 1 : step]
    if as_json:
        print_json(_contents_record(contents, entries))
    else:
        console = plain_console()
        for name, value in asdict(contents.header).items():
            console.print(f"{name:11}{_plain(value)}", soft_wrap=True)
        for change in contents.changes:
            console.print(f"from step {change.step + 1}: {_plain(change.settings)}", soft_wrap=True)
        console.print(counted(steps, "step"), soft_wrap=True)
        console.print(_steps(contents, entries))


@journal_app.command()
def verify(
    path: JournalPath,
    repair: Annotated[
        bool, typer.Option("--repair", help="Go back to the last sound step; all there is now is kept as a branch.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every record, and in a run directory the configuration and the checkpoints too."""
    from zotune.journal import audit, branches

    kept = branches.repair(path) if repair else None
    verdict = audit.verify(path)
    if as_json:
        record = {**asdict(verdict), "journal": str(verdict.journal), "sound": verdict.sound}
        print_json(record | {"kept": None if kept is None else str(kept.path)})
    else:
        if kept is not None:
            typer.echo(f"kept what there was in {kept.path}")
        _print_verdict(path, verdict)
    if not verdict.sound:
        raise typer.Exit(UNSOUND)


@journal_app.command()
def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="Run directory or journal file.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Say whether two runs are the same, and where they part."""
    from zotune.journal import audit

    found = audit.diff(one, other)
    if as_json:
        parting = None if found.parting is None else [_entry_record(entry) for entry in found.parting]
        print_json({**asdict(found), "parting": parting, "same": found.same})
    else:
        _print_difference(found)
    if not found.same:
        raise typer.Exit(DIFFERENT)


def _contents_record(contents: Contents, entries: list[Entry]) -> dict[str, Any]:
    return {
        "header": asdict(contents.header),
        "changes": [{"step": change.step + 1, "settings": change.settings} for change in contents.changes],
        "steps": len(contents.entries),
        "bytes": contents.size,
        "entries": [_entry_record(entry) for entry in entries],
    }


def _entry_record(entry: Entry) -> dict[str, Any]:
    """A step as people count it, from 1."""
    losses = list(map(finite, entry.losses))
    return {**asdict(entry), "step": entry.step + 1, "losses": losses, "skipped": not entry.coefficients}


def _steps(contents: Contents, entries: list[Entry]) -> Table:
    from zotune.optimizer import Method, Optimizer

    optimizer = Optimizer(Method(**contents.header.method), contents.header.steps)
    table = plain_table("step", "losses", "coefficients", "lr", "update", "batch")
    for entry in entries:
        table.add_row(*_row(entry), _update(optimizer, entry), f"{entry.batch:08x}")
    return table


def _row(entry: Entry) -> tuple[str, ...]:
    return (
        str(entry.step + 1),
        " ".join(f"{loss:.6f}" for loss in entry.losses),
        " ".join(f"{coefficient:.5g}" for coefficient in entry.coefficients) or "-",
        f"{entry.lr:.4g}",
    )


def _update(optimizer: Optimizer, entry: Entry) -> str:
    """What the step did to the weights."""
    update = optimizer.update(entry.step, entry.coefficients, entry.lr)
    if optimizer.method.family == "dense":
        return "added" if update.terms else "skipped"
    return f"{'' if update.terms else 'skipped, '}window {update.window}{', folded' if update.closes_window else ''}"


def _print_verdict(path: Path, verdict: Verdict) -> None:
    state = "sound" if verdict.sound else "not sound"
    typer.echo(f"{verdict.journal}: {state}, {counted(verdict.steps, 'step')}, {verdict.size} bytes")
    for text in (*verdict.problems, *verdict.notices):
        typer.echo(f"  {text}")
    if verdict.checkpoints:
        typer.echo(f"  sound checkpoints: {', '.join(map(str, verdict.checkpoints))}")
    if verdict.damaged and path.is_dir():
        typer.echo(f"go back to the last sound step: {command_line('journal', 'verify', path, '--repair')}")


def _print_difference(found: Difference) -> None:
    console = plain_console()
    for name, (one, other) in found.header.items():
        console.print(f"{name}: {_plain(one)} / {_plain(other)}", soft_wrap=True)
    console.print(f"steps: {found.steps[0]} / {found.steps[1]}, the first {found.shared} of them the same")
    if found.parting is not None:
        table = plain_table("", "step", "losses", "coefficients", "lr", "batch")
        for name, entry in zip("AB", found.parting, strict=True):
            table.add_row(name, *_row(entry), f"{entry.batch:08x}")
        console.print(table)
    if found.same:
        console.print("the same run")


def _plain(value: Any) -> str:
    """A value for people: tables as ``key = value``."""
    if isinstance(value, dict):
        return ", ".join(f"{key} = {each}" for key, each in value.items() if each is not None)
    return str(value)
