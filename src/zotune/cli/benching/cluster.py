"""``zotune bench cluster``."""

from __future__ import annotations

from typing import Annotated

import typer

from zotune.cli.benching.program import BatchSize, DataFolder, Dtype, ModelPath, Rank, Scope, bench_app, numbers, show
from zotune.cli.program import AsJson


@bench_app.command("cluster")
def bench_cluster(
    check: Annotated[str, typer.Option(help="Numbers of real replicas to time here, with commas.")] = "1",
    unit_ms: Annotated[
        float | None, typer.Option(min=0, help="Take this as a unit's work, and the four below; time nothing.")
    ] = None,
    update_ms: Annotated[float, typer.Option(min=0, help="With --unit-ms: an update's work on every replica.")] = 0.0,
    call_ms: Annotated[float, typer.Option(min=0, help="With --unit-ms: the driver's work per replica.")] = 0.5,
    driver_ms: Annotated[float, typer.Option(min=0, help="With --unit-ms: the driver's work besides.")] = 1.0,
    start_s: Annotated[float, typer.Option(min=0, help="With --unit-ms: until a replica is replaced.")] = 60.0,
    latency_ms: Annotated[float, typer.Option(min=0, help="Simulated: round trip on the network.")] = 0.5,
    jitter: Annotated[
        float | None, typer.Option(min=0, help="Simulated: relative; default: as measured, or 0.05.")
    ] = None,
    failures: Annotated[float, typer.Option(min=0, help="Simulated: losses of a replica per hour.")] = 0.01,
    model: ModelPath = None,
    data: DataFolder = None,
    dtype: Dtype = "auto",
    batch_size: BatchSize = 16,
    rank: Rank = 2,
    scope: Scope = "all",
    directions: Annotated[int, typer.Option(min=1, help="Two-point directions per step; units with --unit-ms.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Steps to time of each number, in turn.")] = 9,
    cpus: Annotated[int, typer.Option(min=1, help="Cores of a replica.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the simulation.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Simulate steps of up to 4,096 replicas from what one costs, and time real ones here."""
    from zotune.bench import cluster
    from zotune.bench.cluster_simulation import Conditions, Costs

    if unit_ms is not None:
        conditions = Conditions(latency_ms / 1e3, 0.05 if jitter is None else jitter, failures)
        costs = Costs(unit_ms / 1e3, update_ms / 1e3, call_ms / 1e3, driver_ms / 1e3, start_s)
        report = cluster.from_costs(costs, conditions, directions, seed)
    else:
        report = cluster.cluster(
            numbers(int, check, "--check"),
            latency=latency_ms / 1e3,
            jitter=jitter,
            failures=failures,
            model=model,
            data=data,
            dtype=dtype,
            batch_size=batch_size,
            rank=rank,
            scope=scope,
            directions=directions,
            repeats=repeats,
            cpus=cpus,
            seed=seed,
        )
    show(report, as_json)
