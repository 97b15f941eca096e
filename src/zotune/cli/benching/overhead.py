"""``zotune bench overhead``."""

from __future__ import annotations

import math
from typing import Annotated

import typer
from rich.console import Console

from zotune.cli.benching.program import (
    RESULTS,
    Batches,
    DirectionCounts,
    Dtype,
    Minutes,
    Models,
    Out,
    Ranks,
    Repeats,
    Retry,
    Scopes,
    Threads,
    bench_app,
    plan,
)
from zotune.cli.program import AsJson, print_json


@bench_app.command("overhead")
def bench_overhead(
    models: Models = "opt-125m",
    runtimes: Annotated[str, typer.Option(help="torch, vllm, vllm-compiled, with commas.")] = "torch",
    batches: Batches = "16",
    directions: DirectionCounts = "1",
    ranks: Ranks = "2",
    scopes: Scopes = "all",
    dtype: Dtype = "auto",
    repeats: Repeats = 20,
    threads: Threads = None,
    minutes: Minutes = math.inf,
    retry: Retry = False,
    out: Out = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Split a step of training into its phases: drawing, packing, forward, head, loss, call, update, fold, journal.

    Options are those of zotune bench scaling. Then: zotune bench report.
    """
    from zotune import bench

    wanted = plan(
        models=models,
        runtimes=runtimes,
        batches=batches,
        directions=directions,
        ranks=ranks,
        scopes=scopes,
        dtype=dtype,
        threads=threads,
    )
    console = Console(stderr=as_json)
    results = bench.overhead(wanted, out, repeats=repeats, minutes=minutes, retry=retry, console=console)
    if as_json:
        print_json({"results": [vars(result) for result in results]})
