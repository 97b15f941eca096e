"""Mistakes in a configuration or its data: one line each, and no run is left; rows that are cut are told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from tiny_runs import Recorder, contents
from typer.testing import CliRunner

import zotune
from zotune import cli, config
from zotune.cli.program import USER_ERROR
from zotune.config import Config
from zotune.errors import ConfigError, DivergedError

Configure = Callable[..., Config]


@pytest.fixture
def configure(tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]) -> Configure:
    return partial(tiny_runs.configure, tmp_path, tiny_model_folder, sentiment_files)


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


MISTAKES: dict[str, tuple[str, str]] = {
    "field": ('data.prompt="{txet}"', "unknown field 'txet'. Did you mean 'text'?"),
    "label field": ('data.label="lable"', "unknown field 'lable'. Did you mean 'label'?"),
    "candidate without tokens": ('data.candidates=["  ", " great"]', "adds no tokens to the prompt"),
    "candidates alike": ('data.candidates=[" amazing", " awful"]', "have the same tokens"),
    "one candidate": ('data.candidates=[" great"]', "classification needs at least 2"),
    "no rows": ('data.train="TMP/empty.jsonl"', "empty.jsonl has no rows"),
    "one class": ('data.train="TMP/one.jsonl"', "all training rows (2) have the class 'great'"),
    "bad label": ('data.train="TMP/label.jsonl"', "the label is 7; allowed are the numbers 0 to 1"),
    "no file": ('data.train="TMP/none.jsonl"', "none.jsonl does not exist"),
    "context": ("data.max_length=65", "65 is more than the model's context of 64 tokens"),
    "device": ('model.device="gpu"', "device 'gpu' is not there"),
    "device without numbers": (
        "model.device=meta",
        "device 'meta' is not there. Use 'auto', 'cpu' or a CUDA device",
    ),
    "model of nobody": ("model.path=~nosuchuser/x", "cannot use the path '~nosuchuser/x': Could not determine home"),
    "rows of nobody": ("data.train=~nosuchuser/x", "cannot use the path '~nosuchuser/x': Could not determine home"),
    "output of nobody": ("output=~nosuchuser/x", "cannot use the path '~nosuchuser/x': Could not determine home"),
    "long model": (f"model.path={'m' * 300}", "File name too long"),
    "long rows": (f"data.train={'r' * 300}.jsonl", "File name too long"),
    "long output": (f"output={'o' * 300}", "File name too long"),
    "decay": ("method.weight_decay=1e300", "method.weight_decay: Input should be less than or equal to 1000000"),
    "eps": ("method.eps=1e300", "method.eps: Input should be less than or equal to 1"),
    "momentum": ('method={preset="mezo", momentum=0.9}', "momentum = 0.9 needs low-rank directions"),
    "rank": (
        'method={preset="mezo-lora", rank=16}',
        "nothing for the preset 'mezo-lora'. The rank of its LoRA matrices is",
    ),
    "interval": (
        'method={preset="mezo", interval=9}',
        "method.interval means nothing for the preset 'mezo'. Leave it out",
    ),
    "LoRA": ("method.lora_rank=16", "method.lora_rank means nothing for the preset 'lozo'. Leave it out"),
    "preset": ('method.preset="lozzo"', "unknown preset 'lozzo'. Did you mean 'lozo'?"),
    "task": ('data.task="sst"', "unknown task 'sst'. Did you mean 'sst2'?"),
    "key": ("train.batchsize=3", "unknown key 'train.batchsize'. Did you mean 'train.batch_size'?"),
    "output below a file": ('output="TMP/one.jsonl/run"', "cannot make the run directory"),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda name: name.replace(" ", "-"))
def test_a_mistake_is_one_line_and_leaves_no_run(configure: Configure, tmp_path: Path, mistake: str) -> None:
    (tmp_path / "empty.jsonl").touch()
    write(tmp_path / "one.jsonl", {"text": "a film", "label": 1}, {"text": "the plot", "label": 1})
    write(tmp_path / "label.jsonl", {"text": "a film", "label": 1}, {"text": "the plot", "label": 7})
    file = tmp_path / "config.toml"
    file.write_text(config.dump(configure()))
    setting, expected = MISTAKES[mistake]
    before = contents(tmp_path)
    result = CliRunner().invoke(cli.app, ["run", str(file), "--set", setting.replace("TMP", str(tmp_path))])
    assert result.exit_code == USER_ERROR, result.output
    # The bar is silenced by the environment, which a process reads once, when it first imports the libraries.
    (line,) = [line for line in result.stderr.splitlines() if line and "Loading weights" not in line]
    assert line.startswith("error: ")
    assert expected in line
    assert contents(tmp_path) == before


@pytest.mark.parametrize("decay", [1.0, 1e6])
@pytest.mark.parametrize("preset", ["lozo", "lozo-m", "mezo"])
def test_a_decay_that_no_number_can_hold_is_told_as_divergence(configure: Configure, preset: str, decay: float) -> None:
    chosen = configure(method={"preset": preset, "lr": 1e38, "weight_decay": decay}, train={"steps": 20})
    with pytest.raises(DivergedError):
        zotune.start(chosen, Recorder())


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("method", {"preset": "lozzo"}, "unknown preset 'lozzo'. Did you mean 'lozo'?"),
        ("data", {"task": "sst-2"}, "unknown task 'sst-2'. Did you mean 'sst2'?"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_loaded_or_made(
    tmp_path: Path, section: str, values: dict[str, str], expected: str
) -> None:
    table: dict[str, Any] = {
        "output": str(tmp_path / "run"),
        "model": {"path": "no/model"},
        "data": {"train": "no.jsonl"},
    }
    table[section] = {**table.get(section, {}), **values}
    with pytest.raises(ConfigError, match=re.escape(expected)):
        zotune.start(zotune.parse_config(table))
    assert not (tmp_path / "run").exists()


def test_rows_that_were_cut_are_told(configure: Configure, tmp_path: Path) -> None:
    long = {"text": "the film is " * 40 + "fine", "label": 1}
    rows = write(tmp_path / "long.jsonl", long, {"text": "the film is dull", "label": 0}, long)
    seen = Recorder()
    zotune.start(configure(data={"train": rows}, train={"steps": 1}), seen)
    assert "train: 2 of 3 prompts cut at the left, to fit 64 tokens" in seen.notices
    assert "train: 3 rows, terrible 33.3 %, great 66.7 %" in seen.notices
