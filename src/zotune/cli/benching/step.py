"""``zotune bench step``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from zotune.cli.benching.program import (
    BatchSize,
    DataFolder,
    Directions,
    Dtype,
    ModelPath,
    Rank,
    Repeats,
    Scope,
    Threads,
    bench_app,
)
from zotune.cli.program import AsJson, print_json


@bench_app.command("step")
def bench_step(
    model: ModelPath = None,
    data: DataFolder = None,
    dtype: Dtype = "auto",
    baseline_dtype: Annotated[
        str | None, typer.Option(help="The same for the official procedure; default: equal.")
    ] = None,
    batch_size: BatchSize = 16,
    rank: Rank = 2,
    scope: Scope = "all",
    directions: Directions = 1,
    repeats: Repeats = 10,
    threads: Threads = None,
    memory: Annotated[bool, typer.Option("--memory", help="Also compare peak memory with bare inference.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time a whole training step against the official LOZO procedure on the same model, data and machine."""
    from zotune import bench

    report = bench.step(
        model=model,
        data=data,
        dtype=dtype,
        baseline_dtype=baseline_dtype,
        batch_size=batch_size,
        rank=rank,
        scope=scope,
        directions=directions,
        repeats=repeats,
        threads=threads,
        memory=memory,
    )
    if as_json:
        print_json(report.to_json())
    else:
        report.render(Console())
