"""``zotune bench scaling``."""

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


@bench_app.command("scaling")
def bench_scaling(
    models: Models = "opt-125m,opt-350m,opt-1.3b",
    runtimes: Annotated[
        str, typer.Option(help="official (the published procedure), torch, vllm, vllm-compiled, with commas.")
    ] = "official,torch",
    batches: Batches = "4,16,64",
    directions: DirectionCounts = "1",
    ranks: Ranks = "2",
    scopes: Scopes = "all",
    dtype: Dtype = "auto",
    repeats: Repeats = 10,
    threads: Threads = None,
    minutes: Minutes = math.inf,
    retry: Retry = False,
    out: Out = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Time steps of models, batches, directions, ranks, scopes and runtimes: every combination, resumable.

    Models have the shapes of released ones and random weights, so nothing is downloaded; rows are as long as SST-2's.
    Each runtime has a process of its own, and a case that fails is a result, too. Then: zotune bench report.
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
    results = bench.scaling(wanted, out, repeats=repeats, minutes=minutes, retry=retry, console=console)
    if as_json:
        print_json({"results": [vars(result) for result in results]})
