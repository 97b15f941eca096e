"""``zotune bench``: whole steps against the official LOZO procedure, in one run, on this machine.

The sides take turns (A B A B), so that whatever slows the machine down slows all. They have the same model, batches,
rank and probe distance; each runs as it would in use: zotune packs, the official procedure pads.
"""

from __future__ import annotations

from zotune.bench.memory import MemoryReport
from zotune.bench.runtimes import runtimes
from zotune.bench.runtimes_report import RuntimesReport
from zotune.bench.step_report import StepReport
from zotune.bench.steps import step

__all__ = ["MemoryReport", "RuntimesReport", "StepReport", "runtimes", "step"]
