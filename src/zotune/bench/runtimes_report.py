"""What a comparison of runtimes found: one line of JSON, or a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from zotune.figures import counted
from zotune.machine import cpu_name, versions


@dataclass(frozen=True)
class RuntimeReport:
    """One runtime; times are medians in seconds.

    Attributes:
        runtime: Its name.
        step_s: A whole step, with a 1/interval share of the fold at the end of a window.
        phases: The step by phase, mean seconds; ``other`` is driver, calls and losses.
        startup_s: From nothing to ready, model and data loaded, in a process of its own.
        peak_bytes: Peak memory of that process, a few steps and a fold included; on a GPU, of PyTorch's allocator.
    """

    runtime: str
    step_s: float
    phases: dict[str, float]
    startup_s: float = 0.0
    peak_bytes: int = 0

    @property
    def overhead_share(self) -> float:
        """Share of the step's time that is neither forward nor output head."""
        scoring = sum(self.phases.get(name, 0.0) for name in ("forward", "ahead", "read", "head"))
        return 1 - scoring / sum(self.phases.values())


@dataclass(frozen=True)
class RuntimesReport:
    """All of a comparison.

    Attributes:
        model: Hub id or folder.
        dtype: Of the model on every side.
        batch_size: Examples per step.
        rank: Columns of U and V.
        scope: Which sites zotune tunes.
        directions: Two-point directions per step.
        repeats: Timed steps of each side.
        threads: CPU threads.
        baseline_step_s: The official LOZO step, times ``directions``.
        flops: Of the model in zotune's step; see `zotune.bench.StepReport`.
        peak_flops_per_s: Best matrix product measured in between.
        runtimes: One per runtime.
    """

    model: str
    dtype: str
    batch_size: int
    rank: int
    scope: str
    directions: int
    repeats: int
    threads: int
    baseline_step_s: float
    flops: float
    peak_flops_per_s: float
    runtimes: tuple[RuntimeReport, ...]

    def ratio(self, runtime: RuntimeReport) -> float:
        """How many times faster than the official procedure a runtime is."""
        return self.baseline_step_s / runtime.step_s

    def peak_share(self, runtime: RuntimeReport) -> float:
        """A runtime's share of the matmul peak, over the whole step."""
        return self.flops / runtime.step_s / self.peak_flops_per_s

    def to_json(self) -> dict[str, Any]:
        """Everything, with an entry per runtime."""
        entries = [
            asdict(each)
            | {"ratio": self.ratio(each), "peak_share": self.peak_share(each), "overhead_share": each.overhead_share}
            for each in self.runtimes
        ]
        return asdict(self) | {"runtimes": entries, "cpu": cpu_name(), "versions": versions()}

    def render(self, console: Console) -> None:
        """Print a table with a column per runtime."""
        table = Table(title=f"One step: {self.model}, batch {self.batch_size}, rank {self.rank}, scope {self.scope}")
        for heading in ("", *(each.runtime for each in self.runtimes), "official LOZO"):
            table.add_column(heading, justify="left" if not heading else "right")
        table.add_row(
            "seconds per step", *(f"{each.step_s:.3f}" for each in self.runtimes), f"{self.baseline_step_s:.3f}"
        )
        table.add_row("times faster", *(f"{self.ratio(each):.2f}" for each in self.runtimes), "")
        table.add_row("share of matmul peak", *(f"{self.peak_share(each):.1%}" for each in self.runtimes), "")
        table.add_row("not forward or head", *(f"{each.overhead_share:.1%}" for each in self.runtimes), "")
        for phase in dict.fromkeys(name for each in self.runtimes for name in each.phases):
            spent = (f"{each.phases.get(phase, 0.0) * 1e3:.1f}" for each in self.runtimes)
            table.add_row(f"  {phase}, ms", *spent, "")
        table.add_row("start-up, seconds", *(f"{each.startup_s:.1f}" for each in self.runtimes), "")
        table.add_row("peak memory, MB", *(f"{each.peak_bytes / 1e6:.0f}" for each in self.runtimes), "")
        console.print(table)
        peak = f"{self.peak_flops_per_s / 1e9:.0f} GFLOP/s"
        console.print(
            f"{self.dtype}, {counted(self.directions, 'direction')}, {counted(self.repeats, 'step')} each in turn, "
            f"{counted(self.threads, 'CPU thread')}, matmul peak {peak}, {cpu_name()}"
        )
