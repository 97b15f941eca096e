"""``zotune bench runtimes``."""

from __future__ import annotations

from typing import Annotated

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
    words,
)
from zotune.cli.program import AsJson


@bench_app.command("runtimes")
def bench_runtimes(
    runtimes: Annotated[
        str,
        typer.Option(
            help="torch, vllm, vllm-compiled (a minute or more to start), and others' ways through vLLM: lora-slots, "
            "public-api; with commas."
        ),
    ] = "torch,vllm",
    model: ModelPath = None,
    data: DataFolder = None,
    dtype: Dtype = "auto",
    batch_size: BatchSize = 16,
    rank: Rank = 2,
    scope: Scope = "all",
    directions: Directions = 1,
    repeats: Repeats = 9,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Time the same step on several runtimes: step, share of the matmul peak, start-up, memory."""
    from zotune import bench

    report = bench.runtimes(
        words(runtimes),
        model=model,
        data=data,
        dtype=dtype,
        batch_size=batch_size,
        rank=rank,
        scope=scope,
        directions=directions,
        repeats=repeats,
        threads=threads,
    )
    show(report, as_json)
