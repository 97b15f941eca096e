from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from zotune.bench import parity
from zotune.bench.report import parity as parity_report


def test_vllm_is_the_oracle(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    comparison = parity.Comparison(
        models=("tiny:opt",),
        parts=("runtimes",),
        sides=("oracle", "torch", "vllm"),
        dtypes=("float32",),
        probes=4,
        batch_size=4,
    )
    results = parity.parity(comparison, tmp_path, console=Console(quiet=True), threads=1)
    (table,) = parity_report.tables(results)
    named = [(row["runtime"], row["reference"]) for row in table.rows]
    assert named == [("torch", "oracle"), ("vllm", "oracle"), ("vllm", "torch")]
    assert all(max(row["clean"], row["plus"], row["minus"]) < 1e-5 for row in table.rows)
