"""What many replicas would do, and some did: one line of JSON, or tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from zotune.bench.cluster_check import Measured
from zotune.bench.cluster_simulation import Conditions, Costs, Simulated
from zotune.figures import counted
from zotune.machine import cpu_name, versions


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
            cut = f"{counted(self.directions, 'direction')} in {counted(self.units, 'unit')}"
            console.print(f"{about}, {cut}, {cpu_name()}")
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
