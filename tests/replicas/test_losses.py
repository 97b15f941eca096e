"""Replicas die, hang, go astray, come and leave; the run has the bits of one that nothing happened to."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import tiny_runs
import torch
from teams import WarmCluster
from tiny_runs import assert_same

from zotune import checkpoint
from zotune.config import Config
from zotune.errors import EngineError
from zotune.journal import Journal
from zotune.run import RunDirectory
from zotune.runtimes.replicas.runtime import RayRuntime
from zotune.session import Session, restore
from zotune.train import evaluate_run, take_step

pytestmark = pytest.mark.usefixtures("ray_cluster")

Configure = Callable[..., Config]
METHOD = {"preset": "lozo-m", "directions": 4, "interval": 4}


@pytest.fixture
def configure(tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]) -> Configure:
    return partial(tiny_runs.configure, tmp_path, tiny_model_folder, sentiment_files, method=METHOD)


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zotune.runtimes.replicas.runtime.Cluster", WarmCluster)


class Run:
    """A run that is taken step by step."""

    def __init__(self, session: Session, directory: RunDirectory, journal: Journal) -> None:
        self.session, self.directory, self.journal = session, directory, journal

    @property
    def runtime(self) -> RayRuntime:
        assert isinstance(self.session.runtime, RayRuntime)
        return self.session.runtime

    def take(self, steps: int) -> None:
        for step in range(len(self.journal.entries), len(self.journal.entries) + steps):
            take_step(self.session, step, self.journal)

    def save(self) -> None:
        step = len(self.journal.entries)
        window = self.session.optimizer.ask(step).window
        state, own = self.session.runtime.state(), self.journal.identity(step)
        checkpoint.save(self.directory.checkpoints, state, step=step, window=window, keep=2, journal=own)

    def wait_for(self, replicas: int) -> None:
        """Go on until so many are in step."""
        deadline = time.monotonic() + 300
        while len(self.runtime.team.members) != replicas:
            assert time.monotonic() < deadline, self.runtime.news()
            self.runtime.team.tend()
            time.sleep(0.02)

    def take_until(self, condition: Callable[[], bool]) -> None:
        """Go on until something is so; steps as small as these can be done before a replica is asked for its share."""
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, self.runtime.news()
            self.take(1)

    def kill(self, *numbers: int) -> None:
        """Kill replicas and go on until all are missed."""
        victims = [self.runtime.team.members[number] for number in numbers]
        for victim in victims:
            os.kill(victim.introduction.pid, signal.SIGKILL)
        self.take_until(lambda: not any(victim in self.runtime.team.members.values() for victim in victims))

    def pid(self, number: int) -> int:
        return self.runtime.team.members[number].introduction.pid


@contextmanager
def a_run(configure: Configure, output: str = "run", **ray: Any) -> Iterator[Run]:
    runtime = {"type": "ray", "ray": {"unit_tokens": 64, **ray}} if ray else {"type": "ray"}
    config = configure(output=output, runtime=runtime, train={"steps": 1000})
    with closing(Session.build(config)) as session:
        directory = RunDirectory.create(config, session.header())
        journal = Journal.open(directory.journal)
        journal.claim()
        with closing(journal):
            yield Run(session, directory, journal)


def assert_as_undisturbed(configure: Configure, run: Run, **ray: Any) -> None:
    """Journal and state are those of one replica that nothing happened to, which splits a step as the run does."""
    with a_run(configure, output="undisturbed", replicas=1, **ray) as other:
        other.take(len(run.journal.entries))
        assert run.directory.journal.read_bytes() == other.directory.journal.read_bytes()
        assert_same(run.session.runtime.state(), other.session.runtime.state())


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("killed", [(1,), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_killed_replicas_are_replaced_and_nothing_else_changes(configure: Configure, killed: tuple[int, ...]) -> None:
    """One of two or both, after one that was replaced with a checkpoint to start from."""
    with a_run(configure, replicas=2) as run:
        run.take(3)
        run.kill(1)
        run.take(2)
        run.save()
        run.wait_for(2)
        run.take(1)
        run.kill(*killed)
        run.take(2)
        run.wait_for(2)
        run.take(1)
        news = run.runtime.news()
        assert sum("is lost: its process ended; it is replaced" in text for text in news) == 1 + len(killed)
        assert sum("is in step" in text for text in news) == 1 + len(killed)
        assert {each["restarts"] for each in run.runtime.team.figures()} == {len(killed) - 1, 2}
        assert_as_undisturbed(configure, run)


@pytest.mark.usefixtures("warm")
def test_the_replicas_of_a_copied_run_go_by_the_copy(configure: Configure, tmp_path: Path) -> None:
    """Its configuration names the first run's directory, whose checkpoints are not of the copy's steps."""
    with a_run(configure, replicas=1) as run:
        run.take(2)
    (run.directory.path / "replicas.json").unlink()
    copy = RunDirectory(shutil.copytree(run.directory.path, tmp_path / "copy"))
    session, journal = restore(copy, run.session.config)
    journal.claim()
    with closing(session), closing(journal):
        Run(session, copy, journal).take(1)
    assert (copy.path / "replicas.json").exists()
    assert not (run.directory.path / "replicas.json").exists()


@pytest.mark.usefixtures("warm")
def test_an_evaluation_leaves_the_board_to_who_trains(configure: Configure) -> None:
    """Its replicas are neither those that `zotune scale` shows nor as many as it asks for."""
    with a_run(configure, replicas=1) as run:
        run.take(1)
        before = (run.directory.path / "replicas.json").read_bytes()
        evaluate_run(run.directory.path)
        assert (run.directory.path / "replicas.json").read_bytes() == before


@pytest.mark.usefixtures("warm")
def test_a_silent_replica_is_taken_for_dead(configure: Configure) -> None:
    with a_run(configure, replicas=2, patience=4) as run:
        run.take(2)
        # Whoever was the fastest so far is certain to be asked again.
        number = max(run.runtime.team.members, key=lambda each: run.runtime.team.members[each].figures.speed or 0)
        stopped = run.pid(number)
        os.kill(stopped, signal.SIGSTOP)
        try:
            run.take(1)
        finally:
            os.kill(stopped, signal.SIGKILL)
        assert f"replica {number} " in run.runtime.news()[0]
        run.take(1)
        assert_as_undisturbed(configure, run)


@pytest.mark.usefixtures("warm")
def test_a_silent_replica_keeps_nobody_from_a_state(configure: Configure) -> None:
    with a_run(configure, replicas=2, patience=4) as run:
        run.take(2)
        expected = run.runtime.state()
        for move in (run.runtime.state, lambda: run.runtime.load_state(expected, 0)):
            run.wait_for(2)
            number = min(run.runtime.team.members)
            stopped = run.pid(number)
            os.kill(stopped, signal.SIGSTOP)
            try:
                move()
            finally:
                os.kill(stopped, signal.SIGKILL)
            assert any(f"replica {number} " in text and "gave no answer for 4 s" in text for text in run.runtime.news())
        found = run.runtime.state()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.usefixtures("warm")
def test_a_replica_that_went_astray_is_named_and_replaced(configure: Configure) -> None:
    """One of three has an element of its state changed, as a bad memory cell would."""
    with a_run(configure, replicas=3, check_every=4) as run:
        run.take(3)
        member = run.runtime.team.members[1]
        state = member.fetch(60)
        name = next(name for name in state if name.startswith("weight/"))
        state[name].flatten()[0] += 1e-3
        for key, tensor in state.items():
            data = tensor.flatten().view(torch.uint8).numpy().tobytes()
            member.seat.ask("put", key, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), 0, data)
        member.seat.ask("loaded", 0)
        run.take(3)
        assert ["replica 1" in text and "its state differs" in text for text in run.runtime.news()[:1]] == [True]
        run.wait_for(3)
        fingerprints = {each.ask("fingerprint") for each in run.runtime.team.members.values()}
        assert len(fingerprints) == 1


@pytest.mark.usefixtures("warm")
def test_an_added_replica_has_the_others_bits_before_it_scores(configure: Configure) -> None:
    with a_run(configure, replicas=1) as run:
        run.take(6)
        run.runtime.team.resize(3)
        run.wait_for(3)
        old, *new = run.runtime.team.members.values()
        assert [each.figures.speed for each in new] == [None, None], "they have scored nothing"
        state = old.fetch(60)
        for each in new:
            assert_same(each.fetch(60), state)
        run.take_until(lambda: None not in [each.figures.speed for each in new])
        run.runtime.team.resize(1)
        run.take(2)
        assert list(run.runtime.team.members) == [0]
        assert_as_undisturbed(configure, run)


@pytest.mark.usefixtures("warm")
def test_a_straggler_has_a_smaller_share_and_the_bits_stay(configure: Configure) -> None:
    with a_run(configure, replicas=2, split="sign") as run:
        run.take(1)
        began = time.monotonic()
        run.take(1)
        # Long beside a step, however busy the machine is.
        pause = max(0.25, 5 * (time.monotonic() - began))
        slow, shares = run.pid(1), []
        for _ in range(8):
            os.kill(slow, signal.SIGSTOP)
            timer = _later(pause, slow)
            run.take(1)
            timer.join()
            shares.append(run.runtime.team.members[1].figures.share)
        assert min(shares) <= 0.25, shares
        assert_as_undisturbed(configure, run, split="sign")


def _later(seconds: float, pid: int) -> Any:
    """Let a stopped process go on after a while."""
    import threading

    timer = threading.Timer(seconds, os.kill, (pid, signal.SIGCONT))
    timer.start()
    return timer


@pytest.mark.usefixtures("warm")
def test_replicas_that_cannot_be_started_end_a_run_that_has_none_left(
    configure: Configure, tmp_path: Path, tiny_model_folder: Path
) -> None:
    """The model's files have changed since the run began: a newcomer is not like the others were."""
    copy = shutil.copytree(tiny_model_folder, tmp_path / "model")
    with a_run(partial(configure, model={"path": str(copy)}), replicas=1) as run:
        run.take(2)
        _change_a_weight(copy)
        os.kill(run.pid(0), signal.SIGKILL)
        with pytest.raises(EngineError, match=r"no replica is left.*its model is '.*', theirs '.*zotune resume"):
            run.take(1)
        assert len(run.journal.entries) == 2


def _change_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    next(iter(changed.values())).flatten()[0] += 1
    path.unlink()
    save_file(changed, path, metadata={"format": "pt"})


@pytest.mark.slow
def test_thirty_kills_in_three_hundred_steps(configure: Configure) -> None:
    """A replica drawn by chance, every ten steps; processes are started anew each time."""
    chance = random.Random(6)
    with a_run(configure, replicas=2, check_every=50) as run:
        first = median(each.started for each in run.runtime.team.members.values())
        recoveries: list[float] = []
        for step in range(300):
            run.take(1)
            if step % 10 == 9:
                number = chance.choice(list(run.runtime.team.members))
                run.kill(number)
                run.wait_for(2)
                recoveries.append(run.runtime.team.members[number].started)
            if step % 100 == 99:
                run.save()
        assert len(recoveries) == 30
        assert_as_undisturbed(configure, run)
        print(f"first start {first:.1f} s, recoveries {min(recoveries):.1f} to {max(recoveries):.1f} s")
        assert max(recoveries) <= 3 * first
