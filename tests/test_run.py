from __future__ import annotations

import json
import math
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from tiny_runs import Recorder, assert_same, contents, saved
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import zotune
from zotune import checkpoint, cli, config
from zotune.config import Config
from zotune.errors import ConfigError, JournalError, ModelError, RunExistsError, ZotuneError
from zotune.evaluate import Metrics
from zotune.journal import Journal, audit
from zotune.run import RunDirectory
from zotune.watching import metrics
from zotune.watching.report import examples

Configure = Callable[..., Config]


@pytest.fixture
def configure(tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]) -> Configure:
    return partial(tiny_runs.configure, tmp_path, tiny_model_folder, sentiment_files)


@pytest.fixture
def run(configure: Configure, tmp_path: Path) -> Path:
    """A finished run of six steps with checkpoints after four and six."""
    zotune.start(configure(train={"steps": 6, "checkpoint_every": 4}, method={"interval": 3}), Recorder())
    return tmp_path / "run"


def test_a_run_is_a_directory_of_plain_files(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.toml",
        "journal.jsonl",
        "manifest.json",
        "metrics.jsonl",
        "predictions.jsonl",
    ]
    manifest = json.loads((run / "manifest.json").read_text())
    # As it is installed, which may leave out the CUDA that torch.__version__ names.
    assert manifest["versions"]["torch"] == version("torch")
    assert manifest["command"] == sys.argv
    assert manifest["versions"]["python"] == platform.python_version()
    assert {"started", "platform", "cpu", "cores", "threads", "gpus"} <= manifest.keys()


def test_what_the_model_chose_at_each_evaluation_is_on_record(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 6]
    for line in lines:
        accuracy = RunDirectory(run).evaluations()[line["step"]].accuracy
        assert len(line["predicted"]) == len(line["right"]) == 24
        assert sum(line["right"]) / 24 == pytest.approx(accuracy)


def test_the_configuration_of_a_run_says_what_its_preset_meant(run: Path) -> None:
    method = config.load(run / "config.toml").method
    assert (method.preset, method.lr, method.interval) == ("lozo", 1e-3, 3)
    assert (method.rank, method.eps, method.schedule, method.momentum) == (2, 1e-3, "constant", 0)


def test_a_task_is_written_out(configure: Configure, tmp_path: Path) -> None:
    keys = {"task": "sst2", "prompt": None, "candidates": None, "label": None}
    rows = configure().data
    for name in (rows.train, rows.validation):
        Path(str(name)).write_text(Path(str(name)).read_text().replace('"text"', '"sentence"'))
    zotune.start(configure(data=keys, train={"steps": 1}), Recorder())
    data = config.load(tmp_path / "run" / "config.toml").data
    assert (data.task, data.prompt, data.candidates) == ("sst2", "{sentence} It was", [" terrible", " great"])


def test_a_run_that_exists_is_refused_and_not_touched(run: Path, configure: Configure) -> None:
    before = contents(run)
    with pytest.raises(RunExistsError, match=f"{run} exists. Continue it with 'zotune resume {run}'"):
        zotune.start(configure(train={"steps": 1}), Recorder())
    assert contents(run) == before


@pytest.mark.parametrize("kind", ["empty folder", "file", "link to nothing"])
def test_whatever_is_at_the_output_is_refused(configure: Configure, tmp_path: Path, kind: str) -> None:
    if kind == "file":
        (tmp_path / "run").write_text("mine")
    elif kind == "link to nothing":
        (tmp_path / "run").symlink_to("nothing")
    else:
        (tmp_path / "run").mkdir()
    with pytest.raises(RunExistsError, match="run exists and is no run") as caught:
        zotune.start(configure(), Recorder())
    assert "resume" not in str(caught.value)
    assert kind != "file" or (tmp_path / "run").read_text() == "mine"


def test_a_run_may_be_in_the_home_directory(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    chosen = configure(train={"steps": 1}).model_copy(update={"output": "~/runs/a"})
    assert zotune.start(chosen, Recorder()).path == tmp_path / "runs" / "a"
    assert zotune.evaluate_run(Path("~/runs/a")).examples == 24


@pytest.mark.parametrize("missing", ["config.toml", "journal.jsonl", None])
def test_what_is_no_run_cannot_go_on(run: Path, tmp_path: Path, missing: str | None) -> None:
    path = run if missing else tmp_path / "nothing"
    if missing:
        (run / missing).unlink()
    for act in (zotune.resume, zotune.evaluate_run):
        with pytest.raises(JournalError, match=f"{path} is not a run directory"):
            act(path)


def test_a_run_on_other_rows_cannot_go_on(run: Path, configure: Configure) -> None:
    path = Path(str(configure().data.train))
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text(first.replace('"label": 1', '"label": 0') if '"label": 1' in first else first.replace(": 0", ": 1"))
    with path.open("a") as file:
        file.writelines(others)
    before = contents(run)
    with pytest.raises(JournalError, match="cannot go on: its data is not what it began with"):
        zotune.resume(run, Recorder(), steps=9)
    assert contents(run) == before


def test_a_run_on_another_model_cannot_go_on(configure: Configure, tmp_path: Path, tiny_model_folder: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    chosen = configure(model={"path": str(folder)}, train={"steps": 2})
    zotune.start(chosen, Recorder())
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    model.save_pretrained(folder)
    with pytest.raises(JournalError, match="cannot go on: its model is not what it began with"):
        zotune.resume(tmp_path / "run", Recorder(), steps=4)
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match="does not exist"):
        zotune.resume(tmp_path / "run", Recorder(), steps=4)


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("method", "lr", 0.5),
        ("method", "rank", 3),
        ("method", "scope", "linear"),
        ("train", "seed", 1),
        ("train", "batch_size", 5),
        ("runtime", "fold", "master"),
        ("model", "dtype", "bfloat16"),
    ],
)
def test_an_edited_configuration_cannot_go_on(run: Path, table: str, key: str, value: Any) -> None:
    edited = config.load(run / "config.toml").model_dump()
    edited[table][key] = value
    (run / "config.toml").write_text(config.dump(config.parse(edited)))
    with pytest.raises(JournalError, match=f"its .*{'model' if table == 'model' else key} is not what it began with"):
        zotune.resume(run, Recorder())


def follow(refused: pytest.ExceptionInfo[ZotuneError]) -> None:
    """Type the command that an error names."""
    words = shlex.split(str(refused.value).partition("'zotune ")[2].partition("'")[0])
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output


def test_a_learning_rate_that_was_edited_can_be_had_from_there_on(run: Path) -> None:
    path = run / "config.toml"
    path.write_text(path.read_text().replace("lr = 0.001", "lr = 0.0005"))
    with pytest.raises(JournalError, match="or have it from here on") as refused:
        zotune.resume(run, Recorder(), steps=8)
    follow(refused)
    zotune.resume(run, Recorder(), steps=8)
    assert [entry.lr for entry in Journal.open(run / "journal.jsonl").entries] == [0.001] * 6 + [0.0005] * 2


def test_a_longer_run_needs_a_constant_schedule(configure: Configure, tmp_path: Path) -> None:
    run = tmp_path / "run"
    zotune.start(configure(method={"schedule": "linear"}, train={"steps": 3}), Recorder())
    before = contents(run)
    with pytest.raises(ConfigError, match="--steps needs a constant schedule") as refused:
        zotune.resume(run, Recorder(), steps=5)
    assert contents(run) == before
    assert zotune.resume(run, Recorder(), steps=3).steps == 3
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("steps = 3", "steps = 5"))
    with pytest.raises(JournalError, match=r"its steps is not what it began with \(journal: 3, now: 5\)"):
        zotune.resume(run, Recorder())
    follow(refused)
    assert zotune.resume(run, Recorder()).steps == 5


def test_a_longer_run_is_one_of_that_length(run: Path, configure: Configure, tmp_path: Path) -> None:
    summary = zotune.resume(run, Recorder(), steps=np.int64(9))
    assert summary.steps == 9
    assert config.load(run / "config.toml").train.steps == 9
    zotune.start(configure(output="whole", train={"steps": 9}, method={"interval": 3}), Recorder())
    assert_same(saved(run), saved(tmp_path / "whole"))


@pytest.mark.parametrize("steps", [0, 8.5, "9", True])
def test_a_length_that_no_run_has_is_refused(run: Path, steps: Any) -> None:
    before = contents(run)
    with pytest.raises(ConfigError, match=r"train\.steps: "):
        zotune.resume(run, Recorder(), steps=steps)
    assert contents(run) == before


def test_a_run_does_not_become_shorter(run: Path) -> None:
    before = contents(run)
    with pytest.raises(ConfigError, match="has 6 steps already, more than 5"):
        zotune.resume(run, Recorder(), steps=5)
    assert contents(run) == before


def test_a_torn_journal_goes_on_and_says_so(run: Path) -> None:
    whole = (run / "journal.jsonl").read_bytes()
    expected = saved(run)
    (run / "journal.jsonl").write_bytes(whole[:-20])
    shutil.rmtree(run / "checkpoints")
    seen = Recorder()
    zotune.resume(run, seen)
    assert any("torn" in notice for notice in seen.notices)
    assert (run / "journal.jsonl").read_bytes() == whole
    assert_same(saved(run), expected)


def test_a_damaged_checkpoint_is_passed_over_for_the_older_one(run: Path) -> None:
    expected = saved(run)
    newest = run / "checkpoints" / "step-00000006" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert_same(tiny_runs.restored(run), expected)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    seen = Recorder()
    zotune.resume(run, seen)
    assert [notice for notice in seen.notices if "step-00000006 is damaged and not used" in notice]
    assert_same(saved(run), expected)


def test_a_checkpoint_of_another_run_is_passed_over(run: Path, configure: Configure, tmp_path: Path) -> None:
    expected = saved(run)
    train = {"steps": 6, "checkpoint_every": 3, "seed": 5}
    other = zotune.start(configure(output="other", train=train, method={"interval": 3}), Recorder()).path
    for step in (3, 6):
        copy = run / "checkpoints" / f"step-0000000{step}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(other / "checkpoints" / copy.name, copy)
    assert audit.verify(run).checkpoints == (4,)
    assert audit.verify(run).problems == tuple(f"the checkpoint of step {step} is of another run" for step in (3, 6))
    assert_same(tiny_runs.restored(run), expected)
    done = zotune.replay(run, tmp_path / "out")
    assert done.comparison is not None
    assert (done.comparison.step, done.comparison.same) == (4, True)
    seen = Recorder()
    zotune.resume(run, seen)
    assert [notice for notice in seen.notices if "step-00000006 is of another run and not used" in notice]
    assert_same(saved(run), expected)
    assert checkpoint.sound(run / "checkpoints", 6, Journal.open(run / "journal.jsonl").identity)


def test_evaluations_of_other_validation_rows_are_not_compared(run: Path, configure: Configure) -> None:
    rows = Path(str(configure().data.validation))
    whole = rows.read_text()
    # As good as can be, so that it would be the best for ever.
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(re.sub(r'("kind": "eval".*"loss": )[0-9.]+', r"\g<1>0.001", text))
    rows.write_text("".join(whole.splitlines(keepends=True)[:20]))
    seen = Recorder()
    summary = zotune.resume(run, seen, steps=8)
    (told,) = [notice for notice in seen.notices if "validation rows have changed" in notice]
    assert re.search("changed: 20 with the checksum [0-9a-f]{8}, but the last evaluation was of 24 with", told)
    assert [record["step"] for record in seen.evaluations] == [6, 8], "at once, to have something to compare with"
    known = RunDirectory(run).evaluations()
    assert [(step, found.examples) for step, found in known.items()] == [(6, 20), (8, 20)]
    assert (summary.first, summary.last) == (known[6], known[8])
    assert summary.best == min(known, key=lambda step: known[step].loss)
    assert zotune.evaluate_run(run, best=True) == known[summary.best]
    assert [record["step"] for record in metrics.read(run).evaluations] == [6, 8]
    assert [each.step for each in examples.read(run / "predictions.jsonl")] == [6, 8]

    seen = Recorder()
    zotune.resume(run, seen, steps=9)
    assert not [notice for notice in seen.notices if "validation rows have changed" in notice]
    rows.write_text(whole)
    seen = Recorder()
    back = zotune.resume(run, seen, steps=10)
    assert [notice for notice in seen.notices if "rows have changed: 24" in notice]
    assert (back.best, back.first.loss) == (0, 0.001)
    assert sorted(RunDirectory(run).evaluations()) == [0, 6, 10]


def test_patience_begins_anew_with_other_validation_rows(run: Path, configure: Configure) -> None:
    zotune.rollback(run, 6, ["train.patience=2", "train.eval_every=2", "train.min_delta=9", "train.steps=20"])
    rows = Path(str(configure().data.validation))
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:20]))
    summary = zotune.resume(run, Recorder())
    assert summary.stopped is not None
    assert sorted(RunDirectory(run).evaluations()) == [6, 8, 10]


def test_metrics_of_an_earlier_version_name_no_rows_and_are_compared(run: Path) -> None:
    for name in ("metrics.jsonl", "predictions.jsonl"):
        text = (run / name).read_text()
        (run / name).write_text(re.sub(', "rows": "[0-9a-f]{8}"', "", text))
        assert (run / name).read_text() != text
    seen = Recorder()
    zotune.resume(run, seen, steps=9)
    assert not [notice for notice in seen.notices if "validation rows" in notice]
    assert [record["step"] for record in seen.evaluations] == [9]
    assert sorted(RunDirectory(run).evaluations()) == [0, 6, 9]
    assert [each.step for each in examples.read(run / "predictions.jsonl")] == [0, 6, 9]


def test_evaluating_a_run_changes_nothing_and_gives_its_last_figures(run: Path) -> None:
    with (run / "journal.jsonl").open("ab") as file:
        file.write(b'{"step":6,"loss')
    before = contents(run)
    last = RunDirectory(run).evaluations()[6]
    assert zotune.evaluate_run(run) == last
    assert contents(run) == before


def test_two_processes_do_not_train_in_one_run(run: Path) -> None:
    other = Journal.open(run / "journal.jsonl")
    other.claim()
    before = contents(run)
    with pytest.raises(JournalError, match=f"another process is training in {run}"):
        zotune.resume(run, Recorder(), steps=9)
    assert zotune.evaluate_run(run).examples == 24, "looking on is allowed"
    assert contents(run) == before
    other.close()
    assert zotune.resume(run, Recorder(), steps=9).steps == 9


def test_a_torn_line_of_the_metrics_is_cut_off(run: Path) -> None:
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert sorted(RunDirectory(run).evaluations()) == [0]
    zotune.resume(run, Recorder())
    assert sorted(RunDirectory(run).evaluations()) == [0, 6]
    assert all(json.loads(line) for line in path.read_text().splitlines())
    zotune.plot(run)


def test_steps_that_only_the_journal_has_come_back_into_the_metrics(run: Path) -> None:
    path = run / "metrics.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in before if record["step"] not in (2, 6)))
    zotune.resume(run, Recorder())
    timeless = {"seconds": None, "rows_per_s": None}
    steps = {record["step"]: record | timeless for record in before if record["kind"] == "step"}
    after = [json.loads(line) for line in path.read_text().splitlines()]
    assert {record["step"]: record | timeless for record in after if record["kind"] == "step"} == steps
    assert sorted(RunDirectory(run).evaluations()) == [0, 6]
    zotune.plot(run)


@pytest.mark.parametrize("line", ["[]", "3", '{"kind": "eval"}', '{"kind": "eval", "step": 3, "loss": "a"}', "\\xff"])
def test_a_line_of_the_metrics_that_says_nothing_is_passed_over(tmp_path: Path, line: str) -> None:
    directory = RunDirectory(tmp_path)
    directory.metrics.write_text(line + "\n")
    directory.add_metrics({"kind": "eval", "step": 3, "loss": 0.5, "accuracy": None, "examples": 5, "seconds": 0.1})
    assert directory.evaluations() == {3: Metrics(0.5, None, 5)}
    assert directory.recorded_steps() == set()


def test_metrics_that_are_not_finite_are_null_and_come_back(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    record = {"kind": "eval", "step": 3, "loss": math.nan, "accuracy": 0.0, "examples": 5, "seconds": 0.1}
    assert directory.add_metrics(record) == record | {"loss": None}
    assert directory.add_metrics({"kind": "step", "step": 4, "loss": 0.5}) == {"kind": "step", "step": 4, "loss": 0.5}
    assert "NaN" not in directory.metrics.read_text()
    ((step, metrics),) = directory.evaluations().items()
    assert step == 3
    assert math.isnan(metrics.loss)
    assert replace(metrics, loss=0.0) == Metrics(0.0, 0.0, 5)
