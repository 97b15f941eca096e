"""``zotune scale``: how the replicas of a run do, and how many there should be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from zotune.cli.program import AsJson, RunPath, app, command_line, plain_console, plain_table, print_json
from zotune.errors import ConfigError, JournalError
from zotune.figures import counted, percent

if TYPE_CHECKING:
    from zotune.config import Config
    from zotune.run import RunDirectory


@app.command()
def scale(
    path: RunPath,
    replicas: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Have so many from the next step on, also when it is resumed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the replicas of a run on Ray, or change how many there are while it trains."""
    from zotune.journal.branches import open_run
    from zotune.runtimes.replicas.board import Board

    run, config = open_run(path)
    if config.runtime.type != "ray":
        raise ConfigError(
            f"{path} has no replicas, because its runtime.type is {config.runtime.type!r}. Set it to 'ray' in "
            f"{run.config}, then go on with: {command_line('resume', path)}"
        )
    live, board = _is_live(run), Board(run.path)
    if replicas is not None:
        if not live:
            raise ConfigError(
                f"{path} is not training, so there is nothing to scale. Set runtime.ray.replicas in {run.config}, "
                f"then go on with: {command_line('resume', path)}"
            )
        _keep(run, config, replicas)
        board.want(replicas)
    found = board.read()
    if as_json:
        asked = {} if replicas is None else {"wanted": replicas}
        print_json({"run": str(path), "live": live, "wanted": None, "replicas": [], **found, **asked})
    elif replicas is not None:
        typer.echo(f"asked {path} for {counted(replicas, 'replica')}; who is new joins once it is in step")
        typer.echo(f"watch     {command_line('scale', path)}")
    else:
        _show(found, live)


def _keep(run: RunDirectory, config: Config, replicas: int) -> None:
    """Have the run's configuration say so many, by which it is resumed."""
    ray = config.runtime.ray.model_copy(update={"replicas": replicas})
    run.write_config(config.having("runtime", ray=ray))


def _is_live(run: RunDirectory) -> bool:
    """Whether a process is training there."""
    from zotune.journal import locked

    try:
        with locked(run.journal):
            return False
    except JournalError:
        return True


def _show(found: dict[str, Any], live: bool) -> None:
    table = plain_table()
    for name in ("replica", "state", "node", "pid"):
        table.add_column(name, no_wrap=True)
    for name in ("rows/s", "share", "lag, ms", "restarts"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found.get("replicas", ()):
        where = [str(each.get(name, "-")) for name in ("node", "pid")]
        table.add_row(str(each["replica"]), each["state"], *where, *_figures(each), str(each["restarts"]))
    plain_console().print(table)
    typer.echo(f"replicas wanted: {found.get('wanted', 'none')}" + ("" if live else "; the run is not training now"))


def _figures(each: dict[str, Any]) -> list[str]:
    if "rows_per_s" not in each:
        return ["-", "-", "-"]
    return [f"{each['rows_per_s']:.1f}", percent(each["share"]), f"{1e3 * each['lag']:.0f}"]
