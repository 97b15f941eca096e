"""The outcome of a benchmark: one line of JSON, or a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from zotune.bench.memory import MemoryReport
from zotune.figures import counted
from zotune.machine import cpu_name, versions


@dataclass(frozen=True)
class StepReport:
    """Times are medians in seconds.

    Attributes:
        model: Hub id or folder.
        dtype: Of the model under zotune.
        baseline_dtype: Of the model under the official procedure.
        product_dtype: In which zotune's matrix products run on this machine; the peak is measured in it.
        device: Where both run.
        batch_size: Examples per step.
        rank: Columns of U and V.
        scope: Which sites zotune tunes; the official procedure tunes every parameter.
        directions: Two-point directions per step.
        repeats: Timed steps of each side.
        threads: PyTorch's CPU threads.
        step_s: zotune's step, with a 1/interval share of the fold at the end of a window.
        baseline_step_s: The official step, times ``directions``, since it takes one direction a step.
        tokens: Tokens that zotune's step computes, all probes counted.
        baseline_tokens: Tokens that the official step computes, padding included, times ``directions``.
        flops: Floating-point operations of the model in zotune's step: twice the weights used per token, and causal
            attention. Perturbation, drawing and applying are not counted.
        peak_flops_per_s: Best matrix product measured in ``product_dtype``.
        fold_s: One fold, whole.
        phases: zotune's step by phase, mean seconds; ``other`` is what the phases leave.
        memory: Peak memory, where it was asked for.
    """

    model: str
    dtype: str
    baseline_dtype: str
    product_dtype: str
    device: str
    batch_size: int
    rank: int
    scope: str
    directions: int
    repeats: int
    threads: int
    step_s: float
    baseline_step_s: float
    tokens: int
    baseline_tokens: int
    flops: float
    peak_flops_per_s: float
    fold_s: float
    phases: dict[str, float]
    memory: MemoryReport | None = None

    @property
    def ratio(self) -> float:
        """How many times faster zotune's step is."""
        return self.baseline_step_s / self.step_s

    @property
    def tokens_per_s(self) -> float:
        """Computed tokens per second."""
        return self.tokens / self.step_s

    @property
    def flops_per_s(self) -> float:
        """Model operations per second of the whole step."""
        return self.flops / self.step_s

    @property
    def peak_share(self) -> float:
        """Achieved share of the measured matmul peak, over the whole step."""
        return self.flops_per_s / self.peak_flops_per_s

    @property
    def forward_share(self) -> float:
        """Share of the step's time that is the forward."""
        return sum(self.phases[name] for name in ("forward", "ahead", "read")) / sum(self.phases.values())

    def to_json(self) -> dict[str, Any]:
        """Everything, flat but for ``phases``, ``versions`` and ``memory``; rates and shares included."""
        names = ("ratio", "tokens_per_s", "flops_per_s", "peak_share", "forward_share")
        record = asdict(self) | {name: getattr(self, name) for name in names}
        if self.memory is not None:
            record["memory_ratio"] = self.memory.ratio
        return record | {"cpu": cpu_name(), "versions": versions()}

    def render(self, console: Console) -> None:
        """Print two tables: the comparison, and where the step's time goes."""
        table = Table(title=f"One step: {self.model}, batch {self.batch_size}, rank {self.rank}, scope {self.scope}")
        for heading in ("", "zotune", "official LOZO"):
            table.add_column(heading, justify="left" if not heading else "right")
        table.add_row("dtype", self.dtype, self.baseline_dtype)
        table.add_row("seconds per step", f"{self.step_s:.3f}", f"{self.baseline_step_s:.3f}")
        table.add_row("tokens computed", f"{self.tokens}", f"{self.baseline_tokens}")
        table.add_row("times faster", f"{self.ratio:.2f}", "")
        table.add_row("tokens/s", f"{self.tokens_per_s:.0f}", f"{self.baseline_tokens / self.baseline_step_s:.0f}")
        table.add_row("GFLOP/s", f"{self.flops_per_s / 1e9:.1f}", "")
        peak = f"{self.peak_share:.1%} of {self.peak_flops_per_s / 1e9:.0f} GFLOP/s ({self.product_dtype})"
        table.add_row("share of matmul peak", peak, "")
        if self.memory is not None:
            table.add_row("peak memory over bare inference", f"{self.memory.ratio:.2f}", "")
            for name, bytes_ in (("AdamW", self.memory.adamw), ("AdamW on LoRA", self.memory.adamw_lora)):
                if bytes_:
                    table.add_row(f"the same of {name}", f"{bytes_ / self.memory.inference:.2f}", "")
        console.print(table)
        self._render_phases(console)

    def _render_phases(self, console: Console) -> None:
        table = Table(title="Where zotune's step goes")
        for heading in ("phase", "ms", "share"):
            table.add_column(heading, justify="left" if heading == "phase" else "right")
        total = sum(self.phases.values())
        for name, seconds in self.phases.items():
            table.add_row(name, f"{seconds * 1e3:.1f}", f"{seconds / total:.1%}")
        console.print(table)
        repeats, threads = counted(self.repeats, "step"), counted(self.threads, "CPU thread")
        console.print(f"{repeats} each in turn, {threads}, {self.device}, {cpu_name()}")
