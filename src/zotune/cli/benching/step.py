"""``zotune bench step``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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
    show,
)
from zotune.cli.program import AsJson, command_line


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
    memory: Annotated[
        bool, typer.Option("--memory", help="Also compare peak memory with bare inference and AdamW.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Keep the result in this folder; what is there already is not measured again.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time a whole training step against the official LOZO procedure on the same model, data and machine."""
    from zotune import bench
    from zotune.bench.results import Results

    settings: dict[str, Any] = {
        "model": model,
        "data": None if data is None else str(data),
        "dtype": dtype,
        "baseline_dtype": baseline_dtype,
        "batch_size": batch_size,
        "rank": rank,
        "scope": scope,
        "directions": directions,
        "repeats": repeats,
        "threads": threads,
        "memory": memory,
    }
    kept = None if out is None else Results(out, "step")
    if kept is not None and kept.find(settings) is not None:
        typer.echo(f"measured already; {command_line('bench', 'report', kept.folder)} shows it", err=True)
        return
    report = bench.step(**settings)
    if kept is not None:
        kept.add(settings, report.to_json())
    show(report, as_json)
