"""``zotune bench cluster``: steps of many replicas, simulated from what one step costs, and checked on real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from zotune.bench import cluster_check, steps
from zotune.bench.cluster_check import Measured
from zotune.bench.cluster_report import ClusterReport
from zotune.bench.cluster_simulation import Conditions, Costs, simulate, step_seconds
from zotune.errors import ConfigError

REPLICAS = tuple(4**power for power in range(7))
"""Numbers to simulate: 1 to 4,096."""


def from_costs(costs: Costs, conditions: Conditions, units: int, seed: int) -> ClusterReport:
    """Simulate steps whose costs are known."""
    simulated = simulate(costs, conditions, units, REPLICAS, seed)
    return ClusterReport(units, units, costs, conditions, simulated, (), (), {})


def cluster(
    counts: Sequence[int],
    *,
    latency: float,
    jitter: float | None,
    failures: float,
    model: str | None,
    data: Path | None,
    dtype: str,
    batch_size: int,
    rank: int,
    scope: str,
    directions: int,
    repeats: int,
    cpus: int,
    seed: int,
) -> ClusterReport:
    """Time steps of real replicas on this machine, and simulate those of many from what they cost.

    Args:
        counts: Numbers of real replicas; the costs are those of the first.
        latency: Of the simulated cluster; see `zotune.bench.cluster_simulation.Conditions`.
        jitter: The same; None: what was measured.
        failures: The same.
        model: As for `zotune.bench.step`, like those up to ``directions``.
        data: See there.
        dtype: See there.
        batch_size: See there.
        rank: See there.
        scope: See there.
        directions: Two-point directions per step.
        repeats: Steps to time of each number.
        cpus: Cores of a replica, and its threads.
        seed: Of the simulation.

    Raises:
        ConfigError: Ray is not installed, a name is unknown, or a count is not positive.
        ZotuneError: The model cannot be loaded or tuned.
    """
    dtype = steps.resolved(dtype)
    if not counts or min(counts) < 1:
        raise ConfigError(f"got the numbers of replicas {list(counts)}; give one at least, each at least 1, as 1,2")
    steps.check(dtype, dtype, scope, [batch_size, rank, directions, repeats, cpus])
    given = {"model": model, "data": data, "dtype": dtype, "batch_size": batch_size}
    found = cluster_check.measure(counts, given, steps.method_of(scope, rank, directions), cpus, repeats)
    here = Conditions(latency=0.0, jitter=found.jitter, failures=0.0)
    chosen = Conditions(latency, found.jitter if jitter is None else jitter, failures)
    units = found.measured[0].usual[0]
    return ClusterReport(
        units,
        directions,
        found.costs,
        chosen,
        simulate(found.costs, chosen, units, REPLICAS, seed),
        found.measured,
        tuple(_predicted(found.costs, here, each, seed) for each in found.measured),
        {
            "model": Path(model).name if model else "the demo's",
            "data": data.name if data else "the demo's",
            "dtype": dtype,
            "batch": batch_size,
            "cores of a replica": cpus,
        },
    )


def _predicted(costs: Costs, conditions: Conditions, measured: Measured, seed: int) -> float:
    """The median of the simulated steps of all batches."""
    return median(
        step_seconds(replace(costs, unit=seconds), conditions, units, measured.replicas, seed)
        for units, seconds in measured.batches
    )
