from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from zotune import cli
from zotune.bench import sides
from zotune.bench.overhead import PHASES, host_seconds, measure, split
from zotune.bench.results import every
from zotune.journal import Journal
from zotune.optimizer import Method

pytestmark = pytest.mark.usefixtures("one_thread")

CASE = {"model": "tiny-llama", "runtime": "torch", "dtype": "float32", "threads": 1, "scope": "all", "rank": 2}
CASE |= {"directions": 1, "batch_size": 4}
SLOW = 0.05
"""Seconds; every phase of the tiny model takes much less by itself."""


@pytest.fixture
def side() -> Iterator[Any]:
    made = sides.start(CASE, [4])
    yield made
    made.steps.runtime.close()


def slowed(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a method take `SLOW` seconds more."""
    method = getattr(owner, name)

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(SLOW)
        return method(*args, **options)

    monkeypatch.setattr(owner, name, slow)


def test_phases_sum_to_the_step_and_a_fold_counts_by_its_share(side: Any) -> None:
    found = measure(side, CASE, repeats=3)
    phases = found["phases_s"]
    assert tuple(phases) == PHASES
    assert sum(phases.values()) == pytest.approx(found["step_s"])
    assert min(phases.values()) > 0
    assert phases["fold"] * Method().interval > phases["update"], "it passes over all weights"
    assert found["host_s"] is None


@pytest.mark.parametrize("phase", ["draw", "forward", "head", "loss", "rpc", "update", "journal", "other"])
def test_what_a_part_takes_longer_is_found_in_its_phase_alone(
    side: Any, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper = side.steps
    runtime, model = stepper.runtime, stepper.setting.model
    owner, name = {
        "draw": (runtime.space, "probe"),
        "forward": (model.model.layers[0].mlp.up_proj, "forward"),
        "head": (model.lm_head, "forward"),
        "loss": (type(stepper.setting.dataset.objective), "losses"),
        "rpc": (runtime, "score"),
        "update": (runtime.space, "apply"),
        "journal": (Journal, "append"),
        "other": (type(stepper.optimizer), "tell"),
    }[phase]
    slowed(owner, name, monkeypatch)
    _, found = split(stepper, 2, waits=True)
    assert found.pop(phase) >= SLOW
    found.pop("reading")
    assert max(found.values()) < SLOW


def test_the_host_does_not_count_what_follows_the_launches(side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = host_seconds(side.steps, 2)
    assert before > 0
    forward = side.steps.setting.model.forward

    def late(*args: Any, **options: Any) -> Any:
        answer = forward(*args, **options)
        time.sleep(SLOW)
        return answer

    monkeypatch.setattr(side.steps.setting.model, "forward", late)
    step_s, _ = split(side.steps, 2, waits=False)
    assert step_s >= SLOW
    assert host_seconds(side.steps, 2) < SLOW


def test_the_command_keeps_a_case(tmp_path: Path) -> None:
    words = ["bench", "overhead", "--models", "tiny-llama", "--batches", "2", "--dtype", "float32", "--threads", "1"]
    done = CliRunner().invoke(cli.app, [*words, "--repeats", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (result,) = every(tmp_path)
    assert (result.kind, result.case["runtime"], result.case["batch_size"]) == ("overhead", "torch", 2)
    assert result.figures["phases_s"]["forward"] > 0


def test_the_official_procedure_has_no_phases(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["bench", "overhead", "--runtimes", "official", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "leave official out" in done.output
