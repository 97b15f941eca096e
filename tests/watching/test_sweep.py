from __future__ import annotations

import gc
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from tiny_runs import Recorder, configure, contents
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from zotune import cli, config, train
from zotune.config import Config
from zotune.reporters import SilentReporter
from zotune.run import RunDirectory
from zotune.watching import sweep
from zotune.watching.standing import State
from zotune.watching.sweep import work
from zotune.watching.sweep.summary import _groups, _rank

pytestmark = pytest.mark.usefixtures("one_thread")

WILD = ("method = {preset = 'lozo-m', lr = 1e38}", "train.steps = 30")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def sweep_file(folder: Path, base: Config, *lines: str) -> Path:
    """A sweep over a configuration that lies in a file of its own."""
    write(folder / "base.toml", config.dump(base))
    head = [f"output = {json.dumps(str(folder / 'sweep'))}", f"base = {json.dumps(str(folder / 'base.toml'))}"]
    return write(folder / "sweep.toml", "\n".join([*head, *lines]) + "\n")


@pytest.fixture
def base(tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]) -> Config:
    return configure(tmp_path, tiny_model_folder, sentiment_files, train={"steps": 3}, track={"tensorboard": False})


def test_every_run_is_an_ordinary_one_and_the_same_sweep_does_nothing_twice(tmp_path: Path, base: Config) -> None:
    plan = sweep.read(sweep_file(tmp_path, base, "[grid]", "train.seed = [0, 1]"))
    live = Recorder()
    assert sweep.run(plan, lambda: live) == {}
    assert [line for line in live.notices if line.startswith("[")] == [
        "[1/2] seed=0: starting",
        "[2/2] seed=1: starting",
    ]
    alone = base.model_copy(update={"output": str(tmp_path / "alone")})
    train.start(alone, SilentReporter())
    journals = [(path / "journal.jsonl").read_bytes() for path in (tmp_path / "sweep" / "seed=0", tmp_path / "alone")]
    assert journals[0] == journals[1]
    before = contents(tmp_path / "sweep")
    again = Recorder()
    assert sweep.run(plan, lambda: again) == {}
    assert again.notices == ["[1/2] seed=0: finished, 3 steps", "[2/2] seed=1: finished, 3 steps"]
    assert contents(tmp_path / "sweep") == before


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path, base: Config) -> None:
    plan = sweep.read(sweep_file(tmp_path, base, "[grid]", "train.seed = [0, 1]"))
    with pytest.raises(KeyboardInterrupt):
        sweep.run(plan, lambda: Recorder(stop_after=2))
    assert not plan.runs[1].path.exists()
    live = Recorder()
    assert sweep.run(plan, lambda: live) == {}
    assert live.notices[0] == "[1/2] seed=0: going on after step 2"
    assert [record["step"] for record in live.steps] == [3, 1, 2, 3]


def test_a_run_that_chose_its_learning_rate_is_still_the_planned_one(tmp_path: Path, base: Config) -> None:
    base = base.having("method", lr="auto")
    plan = sweep.read(sweep_file(tmp_path, base, "[grid]", "train.seed = [0]"))
    assert sweep.run(plan, SilentReporter) == {}
    (row,) = sweep.summarise(plan).rows
    assert (row.state, row.steps) == ("finished", 3)


def test_a_failing_run_does_not_stop_the_others(tmp_path: Path, base: Config) -> None:
    missing = tmp_path / "no-model"
    rows = ["[[run]]", f'model.path = "{missing}"', "[[run]]", "train.seed = 1", "[[run]]", *WILD]
    plan = sweep.read(sweep_file(tmp_path, base, *rows, "[grid]", "train.max_skipped = [2]"))
    failures = sweep.run(plan, Recorder)
    bad, good, wild = plan.runs
    assert "does not exist" in failures[bad.name]
    assert "was not finite in 2 steps in a row" in failures[wild.name]
    assert good.name not in failures
    summary = sweep.summarise(plan, failures)
    states = {row.name: row.state for row in summary.rows}
    assert states == {bad.name: "failed", good.name: "finished", wild.name: "diverged"}
    # A later look knows why without having been there.
    assert {row.name: row.reason for row in sweep.summarise(plan).rows}[bad.name] == failures[bad.name]
    again = Recorder()
    assert list(sweep.run(plan, lambda: again)) == [bad.name], "a diverged run must not be tried again"


def test_a_directory_of_another_run_is_left_alone(tmp_path: Path, base: Config) -> None:
    plan = sweep.read(sweep_file(tmp_path, base, "[grid]", "train.seed = [0]"))
    sweep.run(plan, SilentReporter)
    before = contents(plan.runs[0].path)
    base = base.having("train", steps=4)
    changed = sweep.read(sweep_file(tmp_path, base, "[grid]", "train.seed = [0]"))
    sweep.run(changed, SilentReporter)
    (row,) = sweep.summarise(changed).rows
    assert row.state == "failed"
    assert "train.steps is 3 there and 4 in the sweep" in str(row.reason)
    elsewhere = f"/elsewhere/{Path(base.model.path).name}"
    changed = sweep.read(sweep_file(tmp_path, base.having("model", path=elsewhere), "[grid]", "train.seed = [0]"))
    (row,) = sweep.summarise(changed).rows
    assert f"model.path is {base.model.path} there and {elsewhere} in the sweep" in str(row.reason)
    assert contents(plan.runs[0].path) == before


def test_a_run_is_the_planned_one_whoever_is_told_of_it_but_not_at_another_learning_rate(
    tmp_path: Path, base: Config
) -> None:
    (planned,) = sweep.read(sweep_file(tmp_path, base, "[grid]", "train.seed = [0]")).runs
    work.carry_on(planned, work.whereabouts(planned), SilentReporter())
    told = replace(planned, config=planned.config.having("track", tensorboard=True))
    assert work.whereabouts(told).state == "finished"
    for table, key, value in (("method", "lr", 0.125), ("data", "fields", {"text": "words"})):
        other = work.whereabouts(replace(planned, config=planned.config.having(table, **{key: value})))
        assert other.state == "failed"
        assert f"{table}.{key}" in str(other.reason)


def test_an_unfinished_run_of_another_configuration_is_not_gone_on_with(tmp_path: Path, base: Config) -> None:
    plan = sweep.read(sweep_file(tmp_path, base, "[grid]", "train.seed = [0]"))
    with pytest.raises(KeyboardInterrupt):
        sweep.run(plan, lambda: Recorder(stop_after=2))
    (row,) = sweep.summarise(plan, {"seed=0": "no more memory"}).rows
    assert (row.state, row.reason, row.steps) == ("failed", "no more memory", 2)
    assert sweep.summarise(plan, {}).rows[0].state == "interrupted"
    before = contents(plan.runs[0].path)
    changed = sweep.read(sweep_file(tmp_path, base.having("train", batch_size=2), "[grid]", "train.seed = [0]"))
    assert sweep.run(changed, Recorder) == {}
    assert contents(plan.runs[0].path) == before
    summary = sweep.summarise(changed)
    assert (summary.rows[0].state, summary.rows[0].steps, summary.rows[0].seconds) == ("failed", 2, 0.0)
    assert summary.plot is None, "its figures are not those of the sweep"


def test_another_run_that_has_been_moved_away_is_told_no_more(tmp_path: Path, base: Config) -> None:
    sweep.run(sweep.read(sweep_file(tmp_path, base, "[grid]", "train.seed = [0, 1]")), SilentReporter)
    changed = sweep.read(sweep_file(tmp_path, base.having("train", batch_size=2), "[grid]", "train.seed = [0, 1]"))
    told = {row.name: str(row.reason) for row in sweep.summarise(changed, {"seed=1": "no more memory"}).rows}
    assert all("is another run" in reason for reason in told.values())
    for each in changed.runs:
        each.path.rename(tmp_path / each.name)
    assert [row.state for row in sweep.summarise(changed).rows] == ["waiting", "waiting"]
    # What a run ended with is told until it is tried again.
    for failures in ({"seed=1": "no more memory"}, None, None):
        told = {row.name: str(row.reason) for row in sweep.summarise(changed, failures).rows if row.reason}
        assert told == {"seed=1": "no more memory"}


def test_whatever_is_raised_costs_one_run(tmp_path: Path, base: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = sweep.read(sweep_file(tmp_path, base, "[grid]", "train.seed = [0, 1]"))
    live, ended = Recorder(), []

    def carry_on(planned: sweep.Planned, *_: object) -> None:
        if planned is plan.runs[0]:
            raise MemoryError("no more of it")

    monkeypatch.setattr(work, "carry_on", carry_on)
    monkeypatch.setattr(live, "finish", lambda: ended.append("told"))
    monkeypatch.setattr(work, "release", lambda: ended.append("released"))
    assert sweep.run(plan, lambda: live) == {"seed=0": "MemoryError: no more of it"}
    assert live.notices[1] == "seed=0 failed: MemoryError: no more of it"
    assert ended == ["told", "released"] * 2


def test_a_folder_that_is_no_run_is_told_and_left_alone(tmp_path: Path, base: Config) -> None:
    plan = sweep.read(sweep_file(tmp_path, base, "[grid]", "train.seed = [0]"))
    plan.runs[0].path.mkdir(parents=True)
    write(plan.runs[0].path / "notes.txt", "mine")
    before = contents(plan.runs[0].path)
    live = Recorder()
    assert sweep.run(plan, lambda: live) == {}
    assert "is not a run directory" in live.notices[0]
    assert contents(plan.runs[0].path) == before


def test_losses_that_are_not_finite_are_no_best_and_no_last_one(tmp_path: Path, base: Config) -> None:
    plan = sweep.read(sweep_file(tmp_path, base, "[grid]", "train.seed = [0]"))
    sweep.run(plan, SilentReporter)
    (before,) = sweep.summarise(plan).rows
    record = {"kind": "eval", "loss": math.nan, "accuracy": math.nan, "examples": 4, "seconds": 0.5}
    run = RunDirectory(plan.runs[0].path)
    run.add_metrics({**record, "step": 0})
    (row,) = sweep.summarise(plan).rows
    assert (row.loss, row.best_loss, row.score, row.best_score) == (
        before.loss,
        before.loss,
        before.score,
        before.score,
    )
    run.add_metrics({**record, "step": 3})
    (row,) = sweep.summarise(plan).rows
    assert (row.loss, row.best_loss, row.score, row.best_score) == (None, None, None, None)


def row(
    name: str, loss: float | None, score: float | None, state: State = "finished", point: dict[str, Any] | None = None
) -> sweep.Row:
    return sweep.Row(name, point or {}, state, None, 3, 1.0, loss, loss, score, score)


def test_what_has_no_figures_comes_last() -> None:
    rows = [row("e", None, None), row("d", 0.1, None), row("c", None, 0.5), row("b", 0.3, 0.5), row("a", 0.9, 0.6)]
    assert [each.name for each in sorted(rows, key=_rank)] == ["a", "b", "c", "d", "e"]


def test_seeds_are_put_together_of_runs_that_ended_with_a_loss() -> None:
    rows = [
        row("a", 1.0, 0.5, "finished", {"train.seed": 0, "method.lr": 1.0}),
        row("b", 2.0, 1.0, "stopped early", {"train.seed": 1, "method.lr": 1.0}),
        row("c", 4.0, 0.0, "interrupted", {"train.seed": 2, "method.lr": 1.0}),
        row("d", None, None, "finished", {"train.seed": 3, "method.lr": 1.0}),
        row("e", 3.0, None, "finished", {"train.seed": 0, "method.lr": 2.0}),
        row("f", 3.0, None, "finished", {"method.lr": 3.0}),
    ]
    both, one = _groups(rows)
    assert both == sweep.Group({"method.lr": 1.0}, 2, 1.5, 0.5**0.5, 0.75, 0.125**0.5)
    assert one == sweep.Group({"method.lr": 2.0}, 1, 3.0, None, None, None)
    assert _groups(rows[1:]) == [], "one seed each has no spread"


def test_the_summary_is_sorted_and_spreads_over_seeds(tmp_path: Path, base: Config) -> None:
    plan = sweep.read(sweep_file(tmp_path, base, "[grid]", "method.lr = [1e-9, 1e-3]", "train.seed = [0, 1]"))
    assert {row.state for row in sweep.summarise(plan).rows} == {"waiting"}
    sweep.run(plan, SilentReporter)
    summary = sweep.summarise(plan)
    assert summary.score == "accuracy"
    ranks = [(-row.score, row.loss) for row in summary.rows if row.score is not None and row.loss is not None]
    assert ranks == sorted(ranks)
    assert len(ranks) == 4
    for row in summary.rows:
        evaluations = RunDirectory(plan.folder / row.name).evaluations()
        assert row.loss == evaluations[3].loss
        assert row.best_loss == min(each.loss for each in evaluations.values())
        assert row.score == evaluations[3].shares["accuracy"]
        assert row.best_score == max(each.shares["accuracy"] for each in evaluations.values())
        assert (row.steps, row.seconds > 0) == (3, True)
    assert {json.dumps(group.point) for group in summary.groups} == {'{"method.lr": 0.001}', '{"method.lr": 1e-09}'}
    ranks = [(-group.score, group.loss) for group in summary.groups if group.score is not None]
    assert ranks == sorted(ranks)
    assert len(ranks) == 2
    for group in summary.groups:
        losses = [row.loss for row in summary.rows if row.point["method.lr"] == group.point["method.lr"]]
        assert group.runs == 2
        assert group.loss == pytest.approx(statistics.fmean(loss for loss in losses if loss is not None))
        assert group.loss_std == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)  # type: ignore[operator]
    written = json.loads((plan.folder / "summary.json").read_text())
    assert [row["name"] for row in written["rows"]] == [row.name for row in summary.rows]
    assert summary.plot is not None
    assert imread(summary.plot).shape[1] > 1000


def test_the_models_of_earlier_runs_are_let_go(tmp_path: Path, base: Config) -> None:
    plan = sweep.read(sweep_file(tmp_path, base, "[grid]", "train.seed = [0, 1]"))
    before = models_in_memory()
    sweep.run(plan, SilentReporter)
    assert models_in_memory() <= before


def models_in_memory() -> int:
    # Without a collection first: the sweep has to see to that itself.
    return sum(type(each) is LlamaForCausalLM for each in gc.get_objects())


def test_threads_of_one_run_are_not_those_of_the_next(tmp_path: Path, base: Config) -> None:
    plan = sweep.read(sweep_file(tmp_path, base, "[grid]", "runtime.threads = [2]"))
    sweep.run(plan, SilentReporter)
    assert torch.get_num_threads() == 1


def test_the_command_shows_the_table_and_speaks_json(tmp_path: Path, base: Config) -> None:
    file = sweep_file(tmp_path, base, "[grid]", "method.lr = [1e-3, 1e-9]", "train.seed = [0, 1]")
    done = CliRunner().invoke(cli.app, ["sweep", str(file)])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    (head,) = (line.split() for line in lines if "best loss" in line)
    assert head == ["lr", "seed", "accuracy", "best", "loss", "best", "loss", "steps", "time", "state"]
    assert any("mean ± std" in line for line in lines)
    assert sum("finished" in line and line.lstrip().startswith(("0.001", "1e-09")) for line in lines) == 4
    shown = CliRunner().invoke(cli.app, ["sweep", str(file), "--summary", "--json"])
    assert shown.exit_code == 0, shown.output
    (line,) = shown.stdout.splitlines()
    record = json.loads(line)
    assert (len(record["rows"]), len(record["groups"]), record["score"]) == (4, 2, "accuracy")


def test_the_table_tells_paths_apart_that_end_alike(tmp_path: Path, base: Config) -> None:
    file = sweep_file(tmp_path, base, "[grid]", 'model.path = ["/a/model", "/b/model"]')
    shown = CliRunner().invoke(cli.app, ["sweep", str(file), "--summary"])
    assert [line.split()[0] for line in shown.stdout.splitlines() if "waiting" in line] == ["/a/model", "/b/model"]


def test_the_command_reports_failure_and_refusal(tmp_path: Path, base: Config) -> None:
    file = sweep_file(tmp_path, base, "[grid]", f'model.path = ["{tmp_path}/none"]')
    failed = CliRunner().invoke(cli.app, ["sweep", str(file)])
    assert failed.exit_code == 1
    assert "does not exist" in failed.stdout
    assert "Traceback" not in failed.output
    refused = CliRunner().invoke(cli.app, ["sweep", str(write(tmp_path / "bad.toml", "x"))])
    assert (refused.exit_code, refused.stdout) == (2, "")
