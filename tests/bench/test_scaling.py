from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from zotune import cli
from zotune.bench import sides
from zotune.bench.results import Results, every
from zotune.bench.scaling import measure
from zotune.optimizer import Method

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = {"model": "tiny-opt", "dtype": "float32", "threads": 1}
METHOD = {"scope": "all", "rank": 2, "directions": 1}


def measured(runtime: str, *batches: int, **method: Any) -> list[dict[str, Any]]:
    """Figures of some batches on one side."""
    case = {**COMMON, "runtime": runtime, **method}
    side = sides.start(case, batches)
    return [dict(measure(side, {**case, "batch_size": batch}, repeats=2)) for batch in batches]


def test_a_side_is_measured_at_one_batch_after_another() -> None:
    small, large = measured("torch", 2, 8, **METHOD)
    assert large["tokens"] == pytest.approx(4 * small["tokens"], rel=0.3)
    assert small["tokens"] == pytest.approx(2 * 2 * small["length"])
    assert large["flops"] > 3 * small["flops"]
    for found in (small, large):
        fold = found["fold_s"] / Method().interval
        assert found["best_s"] + fold <= found["step_s"] <= found["worst_s"] + fold
        # Of two steps the median is the mean.
        assert 0 < sum(found["phases_s"].values()) <= found["step_s"]
        assert min(found["fold_s"], found["startup_s"], found["peak_flops_per_s"]) > 0
        assert found["peak_bytes"] > 50e6


def test_directions_multiply_tokens_and_operations() -> None:
    (one,), (three,) = (measured("torch", 4, **{**METHOD, "directions": count}) for count in (1, 3))
    assert three["tokens"] == 3 * one["tokens"]
    assert three["flops"] == pytest.approx(3 * one["flops"])


def test_the_official_step_pads_and_repeats_prompts_on_the_same_rows() -> None:
    (ours,), (theirs,) = measured("torch", 4, **METHOD), measured("official", 4)
    assert theirs["length"] == ours["length"]
    assert theirs["flops"] == ours["flops"]
    assert theirs["tokens"] > 2 * ours["tokens"]
    assert theirs["phases_s"] == {}
    assert theirs["fold_s"] < 1e-4 < ours["fold_s"]


def test_the_command_goes_on_where_it_stopped(tmp_path: Path) -> None:
    words = ["bench", "scaling", "--models", "tiny-opt", "--runtimes", "official,torch", "--batches", "2"]
    words += ["--dtype", "float32", "--threads", "1", "--repeats", "1", "--out", str(tmp_path)]
    none = CliRunner().invoke(cli.app, [*words, "--minutes", "0"])
    assert none.exit_code == 0, none.output
    assert "2 cases left" in none.output
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    found = every(tmp_path)
    assert {result.case["runtime"] for result in found} == {"official", "torch"}
    assert all(result.figures["step_s"] > 0 for result in found)

    kept = replace(found[0], figures={**found[0].figures, "step_s": 1234.5})
    Results(tmp_path, "scaling").add(kept.case, kept.figures)
    again = CliRunner().invoke(cli.app, [*words, "--json"])
    assert "2 of 2 cases measured already" in again.stderr
    assert 1234.5 in {result["figures"]["step_s"] for result in json.loads(again.stdout)["results"]}


@pytest.mark.parametrize(
    "words", [["--models", "opt-14b"], ["--batches", "many"], ["--runtimes", ""], ["--scopes", "some"]]
)
def test_a_users_mistake_is_one_line_and_measures_nothing(words: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["bench", "scaling", "--out", str(tmp_path / "new"), *words])
    assert done.exit_code == 2
    assert done.output.startswith("error: ")
    assert not (tmp_path / "new").exists()
