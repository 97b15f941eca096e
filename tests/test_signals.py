from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
from tiny_runs import Recorder, assert_same, saved

import zotune
from zotune import checkpoint, journal
from zotune.config import Config
from zotune.protocol import CLEAN, Probe
from zotune.reporters import Record
from zotune.rows import Row
from zotune.runtimes import blueprint
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.signals import Interrupted, Signals, Terminated

Configure = Callable[..., Config]
BOTH = pytest.mark.parametrize(
    ("number", "outcome"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)], ids=["INT", "TERM"]
)


@pytest.fixture
def configure(tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]) -> Configure:
    return partial(tiny_runs.configure, tmp_path, tiny_model_folder, sentiment_files)


def send(number: int) -> None:
    """To this process; its handler has run when this returns."""
    signal.raise_signal(number)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@BOTH
def test_the_first_waits_and_the_second_does_not(number: int, outcome: type[BaseException]) -> None:
    before = handlers()
    with Signals() as signals:
        signals.heed()
        send(number)
        with pytest.raises(Interrupted, match=signal.Signals(number).name) as caught:
            signals.heed()
        assert isinstance(caught.value.outcome, outcome)
        with pytest.raises(outcome):
            send(number)
    assert handlers() == before


def test_what_is_idle_is_cut_short() -> None:
    with Signals() as signals:
        with signals.idle(), pytest.raises(Interrupted):
            send(signal.SIGTERM)
        with pytest.raises(Interrupted), signals.idle():
            pytest.fail("it began, though a signal had come")


def test_ones_own_handlers_come_back_and_ignored_signals_stay_ignored() -> None:
    before = handlers()
    seen: list[int] = []
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Signals() as signals:
            send(signal.SIGINT)
            signals.heed()
            send(signal.SIGTERM)
        assert seen == []
        send(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


class Sender(Recorder):
    """Sends itself a signal when a step is finished."""

    def __init__(self, number: int, after: int) -> None:
        super().__init__()
        self.number, self.after = number, after

    def step(self, record: Record) -> None:
        super().step(record)
        if record["step"] == self.after:
            send(self.number)


@BOTH
def test_a_run_finishes_its_step_saves_and_goes_on_to_the_same_bits(
    configure: Configure, tmp_path: Path, number: int, outcome: type[BaseException]
) -> None:
    zotune.start(configure(output="whole"), Recorder())
    run, before, seen = tmp_path / "run", handlers(), Sender(number, 13)
    with pytest.raises(outcome) as caught:
        zotune.start(configure(), seen)
    assert not isinstance(caught.value, SystemExit) or caught.value.code == 143
    assert handlers() == before
    assert seen.notices[-1] == f"{signal.Signals(number).name} after step 13: saving"
    assert len(journal.read(run / "journal.jsonl").entries) == len(seen.steps) == 13
    assert checkpoint.sound(run / "checkpoints", 13)
    assert zotune.resume(run, Recorder()).steps == 30
    assert_same(saved(run), saved(tmp_path / "whole"))


def sending(numbers: Sequence[int], when: Callable[[int, Sequence[Probe]], bool]) -> type[EmbeddedRuntime]:
    """A runtime that sends its own process signals in the middle of the calls of `score` that ``when`` picks."""

    class Sending(EmbeddedRuntime):
        calls = 0

        def score(self, probes: Sequence[Probe], rows: Sequence[Row], *, normalised: bool = True) -> np.ndarray:
            scores = super().score(probes, rows, normalised=normalised)
            self.calls += 1
            if when(self.calls, probes):
                for number in numbers:
                    send(number)
            return scores

    return Sending


@BOTH
def test_an_evaluation_is_cut_short(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, outcome: type[BaseException]
) -> None:
    zotune.start(configure(output="whole", train={"eval_every": 7}), Recorder())
    seen = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(blueprint, "EmbeddedRuntime", sending([number], lambda n, probes: n > 7 and [*probes] == [CLEAN]))
        with pytest.raises(outcome):
            zotune.start(configure(train={"eval_every": 7}), seen)
    assert [record["step"] for record in seen.evaluations] == [0]
    assert checkpoint.sound(tmp_path / "run" / "checkpoints", 7)
    zotune.resume(tmp_path / "run", seen)
    assert [record["step"] for record in seen.evaluations] == [0, 7, 14, 21, 28, 30]
    assert_same(saved(tmp_path / "run"), saved(tmp_path / "whole"))


def test_a_second_ctrl_c_stops_within_the_step(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zotune.start(configure(output="whole"), Recorder())
    with monkeypatch.context() as patch:
        patch.setattr(blueprint, "EmbeddedRuntime", sending([signal.SIGINT] * 2, lambda n, _: n == 5))
        with pytest.raises(KeyboardInterrupt):
            zotune.start(configure(), Recorder())
    run = tmp_path / "run"
    assert len(journal.read(run / "journal.jsonl").entries) == 3, "one evaluation and three steps before"
    assert not (run / "checkpoints").exists(), "the state in the middle of a step is not saved"
    zotune.resume(run, Recorder())
    assert_same(saved(run), saved(tmp_path / "whole"))


def test_a_run_in_another_thread_leaves_signals_alone(configure: Configure) -> None:
    before, found = handlers(), []

    class Looks(Recorder):
        def step(self, record: Record) -> None:
            found.append(handlers())

    thread = threading.Thread(target=lambda: found.append(zotune.start(configure(train={"steps": 2}), Looks()).steps))
    thread.start()
    thread.join()
    assert found == [before, before, 2]
