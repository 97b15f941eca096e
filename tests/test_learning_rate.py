from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import pstdev
from typing import Any

import pytest
from tiny_runs import Recorder, assert_same, configure

from zotune import config, learning_rate, start
from zotune.errors import ConfigError
from zotune.journal import read
from zotune.journal.branches import rollback
from zotune.optimizer import Optimizer
from zotune.run import RunDirectory, resolved
from zotune.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")

Files = tuple[Path, Path]


@pytest.mark.parametrize(
    ("method", "gain"),
    [
        ({}, lambda slopes, losses: slopes[0] ** 2),
        ({"directions": 4}, lambda slopes, losses: sum(s * s for s in slopes) / 4),
        ({"directions": 16, "estimator": "one-sided"}, lambda slopes, losses: sum(s * s for s in slopes) / 4),
        ({"preset": "fzoo"}, lambda slopes, losses: 1e-3 * sum(s * s for s in slopes) / 4 / pstdev(losses[1:])),
    ],
)
def test_it_is_a_share_of_the_loss_over_what_a_step_gains(
    tmp_path: Path, tiny_model_folder: Path, sentiment_files: Files, method: dict[str, Any], gain: Any
) -> None:
    """The probes of all steps are of one window here, so they can be asked for as they are."""
    made = configure(tmp_path, tiny_model_folder, sentiment_files, method={"lr": "auto", "interval": 1000, **method})
    session = Session.build(resolved(made))
    directions, eps = session.optimizer.method.directions, session.optimizer.method.eps
    few = Optimizer(replace(session.optimizer.method, directions=min(directions, 4)), 1000)
    gains, levels = [], []
    for step in range(32):
        losses = session.losses(few.ask(step), session.batch(step)[0])
        if session.optimizer.method.estimator == "two-point":
            slopes = [(plus - minus) / (2 * eps) for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
        else:
            slopes = [(loss - losses[0]) / eps for loss in losses[1:]]
        gains.append(gain(slopes, losses))
        levels.append(sum(losses) / len(losses))
    # Rounded to two digits.
    expected = 0.006 * directions**0.75 * sum(levels) / sum(gains)
    assert learning_rate.automatic(session) == pytest.approx(expected, rel=0.051)
    session.close()


def test_of_the_loss_of_texts_no_more_counts_than_of_a_choice(
    tmp_path: Path, tiny_model_folder: Path, sentiment_files: Files
) -> None:
    text = {"prompt": "the", "completion": "{text}", "candidates": None, "label": None}
    made = configure(tmp_path, tiny_model_folder, sentiment_files, data=text, method={"lr": "auto", "interval": 1000})
    session = Session.build(resolved(made))
    eps, steep, levels = session.optimizer.method.eps, [], []
    for step in range(32):
        losses = session.losses(session.optimizer.ask(step), session.batch(step)[0])
        steep.append(((losses[0] - losses[1]) / (2 * eps)) ** 2)
        levels += losses
    assert sum(levels) / 64 > 4, "as many nats as the logarithm of the vocabulary"
    assert learning_rate.automatic(session) == pytest.approx(0.006 * math.log(2) * 32 / sum(steep), rel=0.051)
    session.close()


def test_it_leaves_the_session_as_it_was(tmp_path: Path, tiny_model_folder: Path, sentiment_files: Files) -> None:
    session = Session.build(resolved(configure(tmp_path, tiny_model_folder, sentiment_files, method={"interval": 2})))
    before, rows = session.runtime.state(), session.batch(0)[0]
    losses = session.losses(session.optimizer.ask(0), rows)
    first = learning_rate.automatic(session)
    assert learning_rate.automatic(session) == first
    assert_same(session.runtime.state(), before)
    assert session.losses(session.optimizer.ask(0), rows) == losses
    session.close()


@pytest.mark.parametrize("method", [{}, {"directions": 8}, {"preset": "fzoo"}, {"preset": "spsa-1.5"}])
def test_a_run_that_sets_no_learning_rate_learns(
    tmp_path: Path, tiny_model_folder: Path, sentiment_files: Files, method: dict[str, Any]
) -> None:
    made = configure(
        tmp_path, tiny_model_folder, sentiment_files, method={"lr": "auto", **method}, train={"steps": 200}
    )
    told = Recorder()
    summary = start(made, told)
    assert summary.last.loss < 0.8 * summary.first.loss
    run, kept = RunDirectory.open(tmp_path / "run")
    assert isinstance(kept.method.lr, float)
    assert read(run.journal).header.method["lr"] == kept.method.lr
    begun, chosen, *_ = told.notices
    assert begun == "choosing the learning rate by probes on 32 batches"
    assert f"learning rate {kept.method.lr:g}, " in chosen


def test_a_long_run_has_a_lower_rate(tmp_path: Path, tiny_model_folder: Path, sentiment_files: Files) -> None:
    rates = []
    for steps in (10, 220, 880):
        made = configure(tmp_path, tiny_model_folder, sentiment_files, method={"lr": "auto"}, train={"steps": steps})
        session = Session.build(resolved(made))
        rates.append(learning_rate.automatic(session))
        session.close()
    assert rates[0] == rates[1] == pytest.approx(2 * rates[2], rel=0.05), "of two digits each"


def test_a_step_whose_losses_are_all_equal_is_left_out(
    tmp_path: Path, tiny_model_folder: Path, sentiment_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FZOO divides by their deviation."""
    made = configure(tmp_path, tiny_model_folder, sentiment_files, method={"preset": "fzoo", "lr": "auto"})
    session, asked, losses = Session.build(resolved(made)), [], Session.losses

    def level_at_first(self: Session, proposal: Any, examples: Any) -> list[float]:
        asked.append(losses(self, proposal, examples))
        return [0.7] * len(asked[-1]) if len(asked) == 1 else asked[-1]

    monkeypatch.setattr(Session, "losses", level_at_first)
    assert 0 < learning_rate.automatic(session) < 1
    assert len(asked) == 32
    session.close()


def test_a_number_is_taken_as_it_is(tmp_path: Path, tiny_model_folder: Path, sentiment_files: Files) -> None:
    session = Session.build(resolved(configure(tmp_path, tiny_model_folder, sentiment_files, method={"lr": 3e-4})))
    assert learning_rate.settled(session, pytest.fail, pytest.fail) is session
    session.close()


def test_losses_that_are_not_finite_say_what_to_do(
    tmp_path: Path, tiny_model_folder: Path, sentiment_files: Files
) -> None:
    made = configure(tmp_path, tiny_model_folder, sentiment_files, method={"lr": "auto", "eps": 1e30})
    with pytest.raises(ConfigError, match=r"method\.lr = 'auto' finds nothing to go by"):
        start(made, Recorder())
    assert not (tmp_path / "run").exists()


def test_a_later_step_needs_a_number(tmp_path: Path, tiny_model_folder: Path, sentiment_files: Files) -> None:
    start(configure(tmp_path, tiny_model_folder, sentiment_files, train={"steps": 3}), Recorder())
    with pytest.raises(ConfigError, match="from a later step on, give a number"):
        rollback(tmp_path / "run", 2, overrides=["method.lr=auto"])


@pytest.mark.parametrize("lr", ["fast", -1.0, 1e39])
def test_what_it_may_be_is_said_in_one_line(lr: Any) -> None:
    table = {"output": "run", "model": {"path": "m"}, "data": {"task": "sst2"}, "method": {"lr": lr}}
    with pytest.raises(ConfigError, match=r"^configuration: method\.lr: must be 'auto' or a number from 0 to 1e38"):
        config.parse(table)
