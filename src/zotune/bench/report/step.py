"""The report's section on ``zotune bench step``."""

from __future__ import annotations

from collections.abc import Sequence

from zotune.bench.report.section import Section, sound, table
from zotune.bench.results import Result

_HEADINGS = (
    *("model", "dtype", "official LOZO in", "batch", "rank", "directions", "scope", "threads"),
    *("zotune, s", "official, s", "times faster", "share of peak", "memory over inference"),
)


def render(results: Sequence[Result]) -> Section:
    """A line per comparison."""
    rows = [_row(result) for result in sound(results)]
    listed = table(_HEADINGS, rows, words=3) if rows else ""
    return Section.on(results, "A step against the official LOZO step", listed)


def _row(result: Result) -> list[object]:
    found = result.figures
    memory = found.get("memory_ratio")
    return [
        *(found[name] for name in ("model", "dtype", "baseline_dtype", "batch_size", "rank", "directions", "scope")),
        found["threads"],
        f"{found['step_s']:.3f}",
        f"{found['baseline_step_s']:.3f}",
        f"{found['ratio']:.2f}",
        f"{found['peak_share']:.0%} of {found['peak_flops_per_s'] / 1e9:.0f} GFLOP/s",
        "" if memory is None else f"{memory:.2f}",
    ]
