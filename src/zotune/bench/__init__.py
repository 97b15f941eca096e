"""``zotune bench``: zotune's steps against the official LOZO procedure, on this machine.

`step` and `runtimes` compare them in one run: the sides take turns (A B A B), so that whatever slows the machine down
slows all, with the same model, batches, rank and probe distance. `scaling` and `overhead` measure case after case, each
in a process that gives its memory back, and keep every result; so does `zotune.bench.convergence`, which trains.
`zotune.bench.report` shows what has been kept.
"""

from __future__ import annotations

from zotune.bench.memory import MemoryReport
from zotune.bench.overhead import overhead
from zotune.bench.plan import Plan
from zotune.bench.runtimes import runtimes
from zotune.bench.runtimes_report import RuntimesReport
from zotune.bench.scaling import scaling
from zotune.bench.step import step
from zotune.bench.step_report import StepReport

__all__ = ["MemoryReport", "Plan", "RuntimesReport", "StepReport", "overhead", "runtimes", "scaling", "step"]
