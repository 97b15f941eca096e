"""Commands that go back in a run: ``replay`` and ``rollback``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from zotune.cli.program import AsJson, RunPath, app, command_line, plain_console, plain_table, print_json
from zotune.errors import ConfigError
from zotune.figures import counted, percent

if TYPE_CHECKING:
    from zotune.journal.branches import Branch
    from zotune.journal.replay import Replayed

OTHER_BITS = 1


@app.command()
def replay(
    path: RunPath,
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")],
    step: Annotated[int | None, typer.Option(help="Finished steps, from 0; default: all.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the base model; default: the run's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: the run's setting.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the weights of any step of a run, from its base model and its journal alone."""
    from zotune.journal.replay import replay as replay_run

    console = Console(stderr=as_json)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("replaying", total=step)
        done = replay_run(path, out, step, model=model, device=device, progress=lambda n: bar.update(task, completed=n))
    if as_json:
        print_json({"run": str(path), **_replay_record(done)})
    else:
        typer.echo(f"{done.path}: the weights after {counted(done.step, 'step')}, replayed in {done.seconds:.2f} s")
        typer.echo(_verdict(done))
    if done.comparison is not None and not done.comparison.same:
        raise typer.Exit(OTHER_BITS)


@app.command()
def rollback(
    path: RunPath,
    step: Annotated[int | None, typer.Option(help="Go back to the state after so many steps, from 0.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting from there on, e.g. method.lr=1e-6. Repeatable."),
    ] = None,
    branch: Annotated[str | None, typer.Option(help="Go back to this branch instead.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the branches and change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Go back to an earlier step; what came later is kept as a branch in RUN/branches."""
    from zotune.journal import branches

    if (step is not None) + (branch is not None) + listed != 1 or (overrides and step is None):
        raise ConfigError("give one of --step N (with --set KEY=VALUE if you like), --branch NAME and --list")
    if listed:
        _show(branches.branches(path), as_json)
        return
    if branch is not None:
        kept = branches.switch(path, branch)
    else:
        assert step is not None
        kept = branches.rollback(path, step, overrides or ())
    if as_json:
        print_json({"run": str(path), "steps": kept.shared if step is None else step, "kept": _branch_record(kept)})
        return
    if branch is not None:
        typer.echo(f"{path} is the branch {branch} again")
    else:
        typer.echo(f"{path} is at step {step}")
    typer.echo(f"kept      {kept.path} ({counted(kept.steps, 'step')})")
    typer.echo(f"go on     {command_line('resume', path)}")
    typer.echo(f"go back   {command_line('rollback', path, '--branch', kept.name)}")


def _replay_record(done: Replayed) -> dict[str, Any]:
    found = done.comparison
    return {
        "out": str(done.path),
        "step": done.step,
        "seconds": done.seconds,
        "checkpoint": None if found is None else found.step,
        "same_bits": None if found is None else found.same,
        "largest_difference": None if found is None else found.largest,
    }


def _verdict(done: Replayed) -> str:
    found = done.comparison
    if found is None:
        return "no checkpoint on the way to compare with"
    if found.same:
        return f"the checkpoint of step {found.step} has the same bits"
    return (
        f"the checkpoint of step {found.step} has other bits in {len(found.differing)} tensors, by {found.largest:.2g} "
        "at most: another kind of device rounds differently; on the same kind, one of the two is wrong"
    )


def _branch_record(branch: Branch) -> dict[str, Any]:
    last = None if branch.last is None else asdict(branch.last)
    return {**asdict(branch), "path": str(branch.path), "last": last}


def _show(found: list[Branch], as_json: bool) -> None:
    if as_json:
        print_json({"branches": [_branch_record(branch) for branch in found]})
        return
    if not found:
        typer.echo("no branches")
        return
    table = plain_table("branch", "steps", "shared", "last loss", "last accuracy")
    for each in found:
        loss = "-" if each.last is None else f"{each.last.loss:.3f}"
        accuracy = "-" if each.last is None or each.last.accuracy is None else percent(each.last.accuracy)
        table.add_row(each.name, str(each.steps), str(each.shared), loss, accuracy)
    plain_console().print(table)
