from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import Recorder, assert_same, saved

import zotune
from zotune import checkpoint, journal
from zotune.config import Config
from zotune.errors import CallbackError, StopRun
from zotune.journal import Journal
from zotune.reporters import Record, SilentReporter
from zotune.run import RunDirectory

Configure = Callable[..., Config]
METHOD: dict[str, Any] = {"preset": "lozo-m", "interval": 5, "directions": 2}
CADENCES = st.fixed_dictionaries(
    {
        "eval_every": st.integers(1, 14),
        "checkpoint_every": st.integers(1, 14),
        "keep_checkpoints": st.integers(1, 4),
        "eval_minutes": st.none() | st.sampled_from([1e-6, 1e-4, 1.0]),
    }
)


@pytest.fixture
def configure(tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]) -> Configure:
    return partial(tiny_runs.configure, tmp_path, tiny_model_folder, sentiment_files)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cadence=CADENCES, stops=st.sets(st.integers(1, 11), max_size=2), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_what_is_looked_at_and_saved_when_never_changes_a_trajectory(
    configure: Configure,
    tmp_path_factory: pytest.TempPathFactory,
    cadence: dict[str, Any],
    stops: set[int],
    dtype: str,
) -> None:
    folder = tmp_path_factory.mktemp("cadence")
    kind: dict[str, Any] = {"method": METHOD, "model": {"dtype": dtype}}
    plain = configure(output=str(folder / "plain"), train={"steps": 12}, **kind)
    zotune.start(plain, Recorder())
    for stop in sorted(stops):
        with pytest.raises(KeyboardInterrupt):
            begin_or_resume(configure, folder / "odd", {"steps": 12, **cadence}, kind, Recorder(stop_after=stop))
    begin_or_resume(configure, folder / "odd", {"steps": 12, **cadence}, kind, Recorder())
    a, b = folder / "plain", folder / "odd"
    assert (a / "journal.jsonl").read_bytes() == (b / "journal.jsonl").read_bytes()
    assert_same(saved(a), saved(b))

    kept = {int(path.name.removeprefix("step-")) for path in (b / "checkpoints").iterdir()}
    assert 12 in kept
    assert len(kept) <= cadence["keep_checkpoints"] + 1
    losses = {step: metrics.loss for step, metrics in RunDirectory(b).evaluations().items()}
    best = min(losses, key=lambda step: losses[step])
    assert best in kept | {0}
    assert {*range(0, 13, cadence["eval_every"]), 12} <= losses.keys()


def begin_or_resume(
    configure: Configure, run: Path, train: dict[str, Any], kind: dict[str, Any], reporter: Recorder
) -> None:
    if run.exists():
        zotune.resume(run, reporter)
    else:
        zotune.start(configure(output=str(run), train=train, **kind), reporter)


def test_a_run_is_evaluated_when_the_minutes_are_over(configure: Configure) -> None:
    seen = Recorder()
    zotune.start(configure(train={"steps": 8, "eval_minutes": 1e-9}), seen)
    assert [record["step"] for record in seen.evaluations] == list(range(9))
    seen = Recorder()
    zotune.start(configure(output="slower", train={"steps": 8, "eval_minutes": 60.0}), seen)
    assert [record["step"] for record in seen.evaluations] == [0, 8]


def test_the_minutes_count_from_the_last_evaluation(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow(Recorder):
        def step(self, record: Record) -> None:
            super().step(record)
            now[0] += 20.0

    seen = Slow()
    zotune.start(configure(train={"steps": 8, "eval_minutes": 1.0}), seen)
    assert [record["step"] for record in seen.evaluations] == [0, 3, 6, 8]


def test_the_last_ones_and_the_best_are_kept(configure: Configure, tmp_path: Path) -> None:
    train = {"steps": 30, "checkpoint_every": 1, "eval_every": 3, "keep_checkpoints": 2}
    summary = zotune.start(configure(train=train), Recorder())
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert summary.best is not None
    best = {f"step-{summary.best:08d}"} if summary.best else set()
    assert set(kept) == {"step-00000029", "step-00000030"} | best


def test_the_journal_is_on_disk_before_a_checkpoint(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, save, events = Journal.sync, checkpoint.save, []

    def synced(journal: Journal) -> None:
        events.append("journal")
        sync(journal)

    def saved(*args: Any, **values: Any) -> Path:
        events.append("checkpoint")
        return save(*args, **values)

    monkeypatch.setattr(Journal, "sync", synced)
    monkeypatch.setattr(checkpoint, "save", saved)
    zotune.start(configure(train={"steps": 4, "checkpoint_every": 2}), Recorder())
    assert events.count("checkpoint") == 2
    assert all(events[at - 1] == "journal" for at, event in enumerate(events) if event == "checkpoint")


class Stops(Recorder):
    def __init__(self, event: str, at: int) -> None:
        super().__init__()
        self.event, self.at = event, at

    def step(self, record: Record) -> None:
        super().step(record)
        if self.event == "step" and record["step"] == self.at:
            raise StopRun("enough")

    def evaluation(self, record: Record) -> None:
        super().evaluation(record)
        if self.event == "evaluation" and record["step"] >= self.at:
            raise StopRun("enough")


@pytest.mark.parametrize(("event", "at"), [("step", 7), ("evaluation", 6), ("evaluation", 0)])
def test_a_callback_ends_a_run_cleanly(configure: Configure, tmp_path: Path, event: str, at: int) -> None:
    zotune.start(configure(output="whole"), Recorder())
    first, stops, last = Recorder(), Stops(event, at), Recorder()
    summary = zotune.start(configure(train={"eval_every": 3}), first, callbacks=[stops, last])
    run = tmp_path / "run"
    assert (summary.steps, summary.stopped) == (at, "enough")
    assert summary.last == RunDirectory(run).evaluations()[at]
    assert checkpoint.sound(run / "checkpoints", at)
    assert first.steps == stops.steps == last.steps
    assert first.evaluations == stops.evaluations == last.evaluations
    assert first.notices[-1] == f"stopped after step {at}: enough"

    # It may go on all the same, to the same bits.
    done = zotune.resume(run, Recorder(), callbacks=[Recorder()])
    assert (done.steps, done.stopped) == (30, None)
    assert_same(saved(run), saved(tmp_path / "whole"))


class Fails(SilentReporter):
    def __init__(self, event: str) -> None:
        self.event = event

    def step(self, record: Record) -> None:
        if self.event == "step" and record["step"] == 5:
            raise ValueError("no such bucket")

    def evaluation(self, record: Record) -> None:
        if self.event == "evaluation" and record["step"] == 5:
            raise ValueError("no such bucket")

    def finish(self) -> None:
        if self.event == "finish":
            raise ValueError("no such bucket")


@pytest.mark.parametrize("event", ["step", "evaluation", "finish"])
def test_a_callback_that_fails_is_named_and_no_step_is_lost(configure: Configure, tmp_path: Path, event: str) -> None:
    zotune.start(configure(output="whole"), Recorder())
    expected = rf"the callback Fails failed at '{event}': ValueError: no such bucket\. .*resume"
    with pytest.raises(CallbackError, match=expected) as caught:
        zotune.start(configure(train={"eval_every": 5}), Recorder(), callbacks=[Fails(event)])
    assert isinstance(caught.value.__cause__, ValueError)
    run = tmp_path / "run"
    done = 30 if event == "finish" else 5
    assert len(journal.read(run / "journal.jsonl").entries) == done
    assert len(RunDirectory(run).recorded_steps()) == done
    zotune.resume(run, Recorder())
    assert_same(saved(run), saved(tmp_path / "whole"))


def test_callbacks_are_told_in_order_after_the_reporter(configure: Configure) -> None:
    order: list[str] = []

    class Named(SilentReporter):
        def __init__(self, name: str) -> None:
            self.name = name

        def step(self, record: Record) -> None:
            order.append(self.name)

    zotune.start(configure(train={"steps": 2}), Named("main"), callbacks=[Named("a"), Named("b")])
    assert order == list(itertools.chain(*[["main", "a", "b"]] * 2))
