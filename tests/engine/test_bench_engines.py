from __future__ import annotations

from contextlib import closing
from typing import Any, cast

import pytest

from zotune.bench import sides
from zotune.bench.overhead import PHASES
from zotune.bench.overhead import measure as split
from zotune.bench.scaling import measure
from zotune.bench.steps import Stepper

METHOD = {"dtype": "float32", "threads": 1, "scope": "all", "rank": 2, "directions": 2}


def check(case: dict[str, Any]) -> None:
    pytest.importorskip("vllm")
    side = sides.start(case, [2, 4])
    with closing(cast("Stepper", side.steps).runtime):
        # Before anything folds.
        phases = split(side, {**case, "batch_size": 2}, repeats=2)["phases_s"]
        small, large = (measure(side, {**case, "batch_size": batch}, repeats=2) for batch in (2, 4))
    assert tuple(phases) == PHASES
    assert min(phases.values()) > 0, "an engine has a head and a call of its own"
    assert large["tokens"] > 1.5 * small["tokens"]
    assert {"draw", "forward", "head", "fold"} <= small["phases_s"].keys()
    assert min(small["step_s"], small["startup_s"], small["fold_s"]) > 0


def test_random_weights_on_vllm_with_norms_that_only_attention_sees() -> None:
    check({"model": "tiny-qwen3", "runtime": "vllm", **METHOD})


@pytest.mark.slow
def test_the_compiler_too() -> None:
    check({"model": "tiny-opt", "runtime": "vllm-compiled", **METHOD})
