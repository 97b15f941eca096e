"""What many replicas would do, and some did: one line of JSON, or tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from zotune.bench import cluster_check, steps
from zotune.bench.cluster import Conditions, Costs, Simulated, simulate, step_seconds
from zotune.bench.cluster_check import Measured
from zotune.machine import cpu_name, versions

REPLICAS = tuple(4**power for power in range(7))
"""Numbers to simulate: 1 to 4,096."""


@dataclass(frozen=True)
class ClusterReport:
    """All of it; times in seconds.

    Attributes:
        units: Of a step.
        directions: Two-point directions per step.
        costs: Of a step on one replica, measured or given.
        conditions: Of the simulated cluster.
        simulated: Numbers of replicas.
        measured: Real ones on this machine; empty where the costs were given.
        predicted_s: What the simulation says of each of those steps on this machine, from its own `Measured.batches`.
        about: Model, dtype, batch size, cores of a replica; empty where the costs were given.
    """

    units: int
    directions: int
    costs: Costs
    conditions: Conditions
    simulated: tuple[Simulated, ...]
    measured: tuple[Measured, ...]
    predicted_s: tuple[float, ...]
    about: dict[str, Any]

    def speedup(self, measured: Measured) -> float:
        """Directions per second against those of the first number of replicas that was measured."""
        return self.measured[0].step_s / measured.step_s

    def at_best(self, measured: Measured) -> float:
        """The same if nobody ever waited: units per second of all that are busy at once, against those of the first."""

        def rate(each: Measured) -> float:
            units, seconds = each.usual
            return min(each.replicas, units) / seconds

        return rate(measured) / rate(self.measured[0])

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        more = [{"speedup": self.speedup(each), "at_best": self.at_best(each)} for each in self.measured]
        measured = [asdict(each) | extra for each, extra in zip(self.measured, more, strict=True)]
        return asdict(self) | {"measured": measured, "cpu": cpu_name(), "versions": versions()}

    def render(self, console: Console) -> None:
        """Print what was measured, then what was simulated."""
        if self.measured:
            console.print(self._measured())
            about = ", ".join(f"{name} {value}" for name, value in self.about.items())
            console.print(f"{about}, {self.directions} direction(s) in {self.units} units, {cpu_name()}")
        console.print(self._simulated())
        costs, conditions = self.costs, self.conditions
        work = f"unit {1e3 * costs.unit:.1f} ms, update {1e3 * costs.common:.1f} ms"
        driver = f"call {1e3 * costs.call:.2f} ms, driver {1e3 * costs.driver:.2f} ms, start {costs.start:.1f} s"
        latency = f"latency {1e3 * conditions.latency:.2f} ms, jitter {conditions.jitter:.1%}"
        console.print(f"{work}, {driver}; {latency}, {conditions.failures:g} losses per replica and hour")

    def _measured(self) -> Table:
        headings = ("replicas", "step, s", "predicted, s", "speed-up", "at best", "driver and Ray", "bytes", "network")
        table = _table("Measured", *headings)
        for each, predicted in zip(self.measured, self.predicted_s, strict=True):
            table.add_row(
                str(each.replicas),
                f"{each.step_s:.3f}",
                f"{predicted:.3f}",
                f"{self.speedup(each):.2f}",
                f"{self.at_best(each):.2f}",
                f"{1e3 * each.overhead_s:.1f} ms, {each.overhead_s / each.step_s:.1%}",
                f"{each.down_bytes:.0f} + {each.up_bytes:.0f}",
                f"{each.network_bytes:.0f}",
            )
        return table

    def _simulated(self) -> Table:
        table = _table(
            "Simulated", "replicas", f"step of {self.units} units, s", "efficiency", "units for each, s", "efficiency"
        )
        for each in self.simulated:
            table.add_row(
                str(each.replicas),
                f"{each.fixed_s:.4f}",
                f"{each.fixed_efficiency:.1%}",
                f"{each.grown_s:.4f}",
                f"{each.grown_efficiency:.1%}",
            )
        return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


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
        latency: Of the simulated cluster; see `zotune.bench.cluster.Conditions`.
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
    steps.check(dtype, dtype, scope, [batch_size, rank, directions, repeats, cpus, *counts])
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
