"""``zotune tasks``: the built-in tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from zotune.cli.program import AsJson, app, plain_console, plain_table

if TYPE_CHECKING:
    from zotune.tasks import Task


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show all about this one.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the built-in tasks, with the rows they train and are evaluated on; [bold]NAME[/bold] shows one in full."""
    from zotune.tasks import TASKS, get

    if name is not None:
        task = get(name)
        typer.echo(json.dumps(_record(task)) if as_json else _describe(task))
    elif as_json:
        typer.echo(json.dumps([_record(task) for task in TASKS.values()]))
    else:
        plain_console().print(_table(TASKS.values()))


def _table(listed: Iterable[Task]) -> Table:
    table = plain_table("task", "what is to be learnt", "judged by", "rows", "data set", below=1)
    for column in (table.columns[0], *table.columns[2:]):
        column.no_wrap = True
    for task in listed:
        rows = f"{task.defaults.train_size} + {task.defaults.validation_size}"
        source = str(task.defaults.train).removesuffix(":train")
        table.add_row(task.name, task.summary, task.metric, rows, source)
    return table


def _record(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "summary": task.summary,
        "citation": task.citation,
        "metric": task.metric,
        "deviations": task.deviations,
        "defaults": task.defaults.model_dump(exclude_defaults=True),
    }


def _describe(task: Task) -> str:
    record = _record(task)
    return "\n".join(
        (
            f"{task.name}: {task.summary}",
            f"source: {task.citation}",
            f"judged by: {task.metric}",
            "defaults, as in the table [data]:",
            *(f"  {key} = {json.dumps(value, ensure_ascii=False)}" for key, value in record["defaults"].items()),
            "deviations from the published protocol:",
            *(f"  {line}" for line in task.deviations or ("none",)),
        )
    )
