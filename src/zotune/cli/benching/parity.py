"""``zotune bench parity``."""

from __future__ import annotations

import math
from typing import Annotated

import typer
from rich.console import Console

from zotune.cli.benching.program import (
    RESULTS,
    BatchSize,
    DataFolder,
    Minutes,
    Out,
    Retry,
    Scope,
    Threads,
    bench_app,
    words,
)
from zotune.cli.program import AsJson, print_json


@bench_app.command("parity")
def bench_parity(
    models: Annotated[
        str, typer.Option(help="With commas: demo, tiny:FAMILY, hub ids or folders.")
    ] = "tiny:opt,tiny:llama",
    data: DataFolder = None,
    parts: Annotated[
        str, typer.Option(help="runtimes, causes, eps, trajectories, with commas.")
    ] = "runtimes,causes,eps,trajectories",
    sides: Annotated[str, typer.Option(help="oracle, torch, vllm, vllm-compiled, with commas.")] = "oracle,torch,vllm",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16, float16, with commas.")] = "float32,bfloat16",
    scope: Scope = "all",
    probes: Annotated[int, typer.Option(min=1, help="Directions, each on a batch of its own.")] = 200,
    eps: Annotated[float, typer.Option(help="Distance of a probe.")] = 1e-3,
    batch_size: BatchSize = 16,
    presets: Annotated[str, typer.Option(help="Of trajectories, with commas.")] = "lozo",
    steps: Annotated[int, typer.Option(min=1, help="Of a trajectory.")] = 300,
    lr: Annotated[float, typer.Option(help="Of trajectories.")] = 3e-5,
    seeds: Annotated[int, typer.Option(min=1, help="Trajectories of each side.")] = 1,
    threads: Threads = None,
    minutes: Minutes = math.inf,
    retry: Retry = False,
    out: Out = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Compare losses, coefficients and trajectories of the runtimes with the dense oracle's; resumable."""
    from zotune.bench import parity
    from zotune.bench.report import parity as tables

    comparison = parity.Comparison(
        models=words(models),
        data=data,
        parts=words(parts),
        sides=words(sides),
        dtypes=words(dtypes),
        scope=scope,
        probes=probes,
        eps=eps,
        batch_size=batch_size,
        presets=words(presets),
        steps=steps,
        lr=lr,
        seeds=seeds,
    )
    notes = Console(stderr=True)
    results = parity.parity(comparison, out, console=notes, threads=threads, minutes=minutes, retry=retry)
    if as_json:
        print_json(tables.to_json(results))
    else:
        for table in tables.tables(results):
            typer.echo(f"{table.markdown()}\n")
