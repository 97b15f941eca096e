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
from zotune.runtimes.embedded.ahead import Ahead

pytestmark = pytest.mark.usefixtures("one_thread")

CASE = {"model": "tiny-llama", "runtime": "torch", "dtype": "float32", "threads": 1, "scope": "all", "rank": 2}
CASE |= {"directions": 1, "batch_size": 4}


class Clock:
    """Time that stands still but in what is slow, which takes a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self._patch = 0.0, monkeypatch
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def slow(self, owner: Any, name: str) -> None:
        """Let a method be slow, in its end."""
        method = getattr(owner, name)

        def slow(*args: Any, **options: Any) -> Any:
            answer = method(*args, **options)
            self.now += 1.0
            return answer

        self._patch.setattr(owner, name, slow)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def side() -> Iterator[Any]:
    made = sides.start(CASE, [4])
    yield made
    made.steps.runtime.close()


def test_phases_sum_to_the_step_and_a_fold_counts_by_its_share(side: Any) -> None:
    found = measure(side, CASE, repeats=3)
    phases = found["phases_s"]
    assert tuple(phases) == PHASES
    assert sum(phases.values()) == pytest.approx(found["step_s"])
    assert min(phases.values()) > 0
    assert phases["fold"] * Method().interval > phases["update"], "it passes over all weights"
    assert found["host_s"] is None


@pytest.mark.parametrize("phase", ["draw", "forward", "head", "loss", "rpc", "update", "journal", "other"])
def test_what_a_part_takes_is_found_in_its_phase_alone(side: Any, phase: str, clock: Clock) -> None:
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
    clock.slow(owner, name)
    step_s, found = split(stepper, 2, waits=True)
    assert {name: value for name, value in found.items() if value} == {phase: 1.0}
    assert step_s == 1.0


def test_the_host_does_not_count_what_follows_the_launches(side: Any, clock: Clock) -> None:
    runtime = side.steps.runtime
    clock.slow(runtime, "_read")
    assert split(side.steps, 2, waits=False)[0] == 1.0
    assert host_seconds(side.steps, 2) == (0.0, 0.0)
    clock.slow(side.steps.setting.model.lm_head, "forward")
    clock.slow(runtime.space, "apply")
    assert host_seconds(side.steps, 2) == (2.0, 0.0)
    runtime._ahead = Ahead(runtime._packed, runtime.space.directions)
    clock.slow(runtime._ahead, "get_ready")
    assert host_seconds(side.steps, 2) == (2.0, 1.0)


def test_the_command_keeps_every_case(tmp_path: Path) -> None:
    words = ["bench", "overhead", "--models", "tiny-llama", "--batches", "2", "--dtype", "float32", "--threads", "1"]
    done = CliRunner().invoke(cli.app, [*words, "--repeats", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = {(result.kind, result.case["batch_size"]): result.figures for result in every(tmp_path)}
    assert found.keys() == {("overhead", 2)}
    assert all(figures["phases_s"]["forward"] > 0 for figures in found.values()), found


def test_the_official_procedure_has_no_phases(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["bench", "overhead", "--runtimes", "official", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "leave official out" in done.output
