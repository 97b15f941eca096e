from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny_runs
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import Recorder, contents
from typer.testing import CliRunner

import zotune
from zotune import cli, stopping
from zotune.config import Config
from zotune.errors import StopRun
from zotune.evaluate import Metrics
from zotune.journal import Entry
from zotune.run import RunDirectory

Configure = Callable[..., Config]
LOSSES = st.lists(st.floats(0, 2) | st.sampled_from([math.nan, math.inf]), min_size=1, max_size=12)


@pytest.fixture
def configure(tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]) -> Configure:
    return partial(tiny_runs.configure, tmp_path, tiny_model_folder, sentiment_files)


def evaluations(*losses: float) -> dict[int, Metrics]:
    return {10 * number: Metrics(loss, None, 5) for number, loss in enumerate(losses)}


def stalled(losses: list[float], patience: int | None, min_delta: float = 0.0) -> bool:
    try:
        stopping.stop_if_stalled(evaluations(*losses), patience, min_delta)
    except StopRun:
        return True
    return False


def test_the_best_is_the_earliest_of_the_lowest() -> None:
    assert stopping.best(evaluations(0.9, 0.5, math.nan, 0.5, 0.7)) == 10
    assert stopping.best(evaluations(math.nan, math.inf)) is None
    assert stopping.best({}) is None
    assert stopping.best(dict(reversed(evaluations(0.9, 0.5, 0.5, 0.7).items()))) == 10


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "expected"),
    [
        ([0.9, 0.8, 0.7], 1, 0.0, False),
        ([0.9, 0.9], 1, 0.0, True),
        ([0.9, 0.8, 0.85, 0.79, 0.8], 2, 0.0, False),
        ([0.9, 0.8, 0.85, 0.8], 2, 0.0, True),
        ([0.9, 0.85, 0.8, 0.75], 2, 0.2, True),
        ([0.9, 0.85, 0.69, 0.65], 2, 0.2, False),
        ([0.9, math.nan, math.nan], 2, 0.0, True),
        ([0.9, 0.9, 0.9], None, 0.0, False),
    ],
)
def test_patience_counts_evaluations_since_the_last_improvement(
    losses: list[float], patience: int | None, min_delta: float, expected: bool
) -> None:
    assert stalled(losses, patience, min_delta) == expected


def test_evaluations_count_in_the_order_of_their_steps_and_the_reason_is_in_figures() -> None:
    backwards = dict(reversed(evaluations(0.9, 0.8, 0.75, 0.7).items()))
    stopping.stop_if_stalled(backwards, 1, 0.0)
    with pytest.raises(StopRun, match=r"has not fallen by more than 0\.2 in 3 evaluations"):
        stopping.stop_if_stalled(backwards, 2, 0.2)


@given(LOSSES, st.integers(1, 4), st.floats(0, 0.5))
def test_a_more_patient_or_less_demanding_run_never_stops_earlier(
    losses: list[float], patience: int, min_delta: float
) -> None:
    if not stalled(losses, patience, min_delta):
        assert not stalled(losses, patience + 1, min_delta)
    if not stalled(losses, patience, 0.5):
        assert not stalled(losses, patience, 0.0)


def test_a_run_that_gets_worse_stops_names_its_best_step_and_keeps_it(configure: Configure, tmp_path: Path) -> None:
    # A learning rate that is far too high, after a start that is not.
    method = {"lr": 1e-2, "eps": 1e-2, "directions": 4, "interval": 10}
    train = {"steps": 200, "eval_every": 5, "patience": 4, "keep_checkpoints": 1, "batch_size": 16}
    seen = Recorder()
    summary = zotune.start(configure(method=method, train=train), seen)
    losses = {record["step"]: record["loss"] for record in seen.evaluations}
    assert summary.steps < 200
    assert summary.stopped == "the validation loss has not fallen in 4 evaluations (train.patience)"
    assert f"stopped after step {summary.steps}: {summary.stopped}" in seen.notices
    assert summary.best == min(losses, key=lambda step: losses[step])
    assert 0 < summary.best == summary.steps - 20

    run = tmp_path / "run"
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (summary.best, summary.steps)]
    assert zotune.evaluate_run(run, best=True) == RunDirectory(run).evaluations()[summary.best]
    assert zotune.evaluate_run(run) == summary.last != zotune.evaluate_run(run, best=True)
    result = CliRunner().invoke(cli.app, ["eval", str(run), "--best", "--json"])
    assert json.loads(result.stdout)["loss"] == losses[summary.best]

    # It is over: to resume it changes nothing, as after its last step.
    before = contents(run)
    again = zotune.resume(run, Recorder())
    assert (again.steps, again.stopped, again.best) == (summary.steps, summary.stopped, summary.best)
    assert contents(run) == before


def test_a_run_that_was_interrupted_stops_where_it_would_have(configure: Configure, tmp_path: Path) -> None:
    kind = {"train": {"steps": 60, "eval_every": 4, "patience": 2, "min_delta": 0.05}}
    whole = zotune.start(configure(output="whole", **kind), Recorder())
    assert 8 < whole.steps < 60
    with pytest.raises(KeyboardInterrupt):
        zotune.start(configure(output="parts", **kind), Recorder(stop_after=3))
    for stop in (6, 7):
        with pytest.raises(KeyboardInterrupt):
            zotune.resume(tmp_path / "parts", Recorder(stop_after=stop))
    parts = zotune.resume(tmp_path / "parts", Recorder())
    assert (parts.steps, parts.stopped, parts.last) == (whole.steps, whole.stopped, whole.last)
    runs = [tmp_path / name for name in ("whole", "parts")]
    assert len({(run / "journal.jsonl").read_bytes() for run in runs}) == 1
    evaluated = [RunDirectory(run).evaluations() for run in runs]
    assert evaluated[0] == evaluated[1]

    # A power cut took the end of the journal, but not the evaluations after it.
    path = tmp_path / "parts" / "journal.jsonl"
    text = path.read_bytes()
    path.write_bytes(b"".join(text.splitlines(keepends=True)[:6]))
    again = zotune.resume(tmp_path / "parts", Recorder())
    assert (again.steps, again.stopped, again.best) == (whole.steps, whole.stopped, whole.best)
    assert path.read_bytes() == text


@pytest.mark.parametrize(
    ("losses", "coefficients", "diverged", "stuck"),
    [
        ((0.7, 0.7), (0.0,), False, True),
        ((math.nan, 0.7), (), True, False),
        ((0.7, 0.6), (0.1,), False, False),
        ((0.0, 0.0), (0.0,), False, False),
        ((0.0, 0.0, 0.7, 0.7), (0.0, 0.0), False, True),
    ],
    ids=["all the same", "not finite", "an estimate", "nothing left to learn", "the same along each direction"],
)
def test_steps_that_teach_nothing_are_told(
    losses: tuple[float, ...], coefficients: tuple[float, ...], diverged: bool, stuck: bool
) -> None:
    entries = [Entry(step, losses, coefficients, 1e-3, 0) for step in range(3)]
    assert stopping.has_diverged(entries, 3) is diverged
    assert stopping.is_stuck(entries, 3) is stuck
    assert not stopping.has_diverged(entries, 4)
    assert not stopping.is_stuck(entries, 4)
    assert not stopping.is_stuck(entries, 2), "it was told a step before"
    taught = Entry(0, (0.7, 0.6), (0.1,), 1e-3, 0)
    assert stopping.has_diverged([taught, *entries], 3) is diverged
    assert stopping.is_stuck([taught, *entries], 3) is stuck
