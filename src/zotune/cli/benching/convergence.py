"""``zotune bench convergence``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from zotune.cli.benching.program import BatchSize, Dtype, ModelPath, Threads, bench_app
from zotune.cli.program import AsJson, print_json
from zotune.errors import ConfigError

Number = TypeVar("Number", int, float)


@bench_app.command("convergence")
def bench_convergence(
    method: Annotated[
        list[str],
        typer.Option(
            help="NAME,KEY=VALUE,...: a preset, official-lozo or official-mezo, with its own method settings, steps, "
            "batch_size, eval_every. Again for the next one."
        ),
    ],
    tasks: Annotated[str, typer.Option(help="Built-in tasks, with commas: sst2,rte,cb,boolq,wic,copa.")] = "sst2",
    seeds: Annotated[str, typer.Option(help="Of directions and batches, with commas.")] = "0,1,2",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training.")] = 300,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 50,
    batch_size: BatchSize = 16,
    model: ModelPath = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with train and validation rows in a folder per task; default: the hub.")
    ] = None,
    validation_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows to evaluate on; default: as many as the task says.")
    ] = None,
    targets: Annotated[str, typer.Option(help="Accuracies to reach, with commas.")] = "0.7,0.75,0.8",
    dtype: Dtype = "auto",
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="Folder of the results; there already: go on.")] = Path("convergence"),
    minutes: Annotated[float, typer.Option(min=0, help="Begin no training after so many.")] = float("inf"),
    retry: Annotated[bool, typer.Option("--retry", help="Measure again what failed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let methods learn the same rows with several seeds: loss and accuracy by steps, forwards and seconds."""
    from zotune.bench import convergence_report
    from zotune.bench.convergence import convergence

    wanted = _numbers(float, "targets", targets)
    results = convergence(
        method,
        out=out,
        tasks=[name.strip() for name in tasks.split(",")],
        seeds=_numbers(int, "seeds", seeds),
        steps=steps,
        eval_every=eval_every,
        batch_size=batch_size,
        model=model,
        data=data,
        validation_rows=validation_rows,
        dtype=dtype,
        threads=threads,
        retry=retry,
        minutes=minutes,
    )
    if as_json:
        print_json(convergence_report.record(results, wanted))
    else:
        typer.echo(convergence_report.markdown(results, wanted))


def _numbers(kind: Callable[[str], Number], option: str, text: str) -> list[Number]:
    try:
        return [kind(each) for each in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{option} takes numbers with commas, got {text!r}") from None
