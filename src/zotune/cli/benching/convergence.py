"""``zotune bench convergence``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from zotune.cli.benching.program import (
    RESULTS,
    BatchSize,
    Dtype,
    Minutes,
    ModelPath,
    Out,
    Retry,
    Threads,
    bench_app,
    numbers,
    words,
)
from zotune.cli.program import AsJson, print_json


@bench_app.command("convergence")
def bench_convergence(
    method: Annotated[
        list[str],
        typer.Option(
            help="NAME,KEY=VALUE,...: a preset, official-lozo, official-mezo, adamw or adamw-lora, with its own method "
            "settings, steps, batch_size, eval_every. Again for the next one."
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
    out: Out = RESULTS,
    minutes: Minutes = math.inf,
    retry: Retry = False,
    as_json: AsJson = False,
) -> None:
    """Let methods learn the same rows with several seeds: loss and accuracy by steps, forwards and seconds."""
    from zotune.bench.convergence import convergence
    from zotune.bench.report import convergence as report

    wanted = numbers(float, targets, "--targets")
    results = convergence(
        method,
        out=out,
        tasks=words(tasks),
        seeds=numbers(int, seeds, "--seeds"),
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
        print_json(report.record(results, wanted))
    else:
        typer.echo(report.render(results, wanted).markdown)
