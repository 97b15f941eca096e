"""Replay: the weights of any step from base model and journal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_runs import Recorder, assert_same, contents
from transformers import AutoModelForCausalLM, AutoTokenizer

import zotune
from zotune import checkpoint
from zotune.config import Config
from zotune.errors import ConfigError, JournalError, ModelError
from zotune.journal import records
from zotune.run import RunDirectory
from zotune.session import Session

Configure = Callable[..., Config]

KINDS: dict[str, dict[str, Any]] = {
    "lozo": {"method": {"interval": 7, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 3}},
    "lozo-m, bfloat16, master copy": {
        "method": {"preset": "lozo-m", "interval": 7, "directions": 2},
        "model": {"dtype": "bfloat16"},
        "runtime": {"fold": "master"},
    },
    "lozo, bfloat16": {"method": {"interval": 7}, "model": {"dtype": "bfloat16"}},
    "mezo, bfloat16": {"method": {"preset": "mezo", "lr": 3e-4}, "model": {"dtype": "bfloat16"}},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def configure(tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]) -> Configure:
    return partial(tiny_runs.configure, tmp_path, tiny_model_folder, sentiment_files)


def train(configure: Configure, **tables: Any) -> Path:
    """A run of 16 steps with a checkpoint of each, and its directory."""
    steps = {"steps": 16, "checkpoint_every": 1, "keep_checkpoints": 99}
    return zotune.start(configure(**tables | {"train": steps}), Recorder()).path


def exported(run: Path, step: int, out: Path) -> dict[str, torch.Tensor]:
    """The weights that the checkpoint of a step holds, exported."""
    directory, config = RunDirectory.open(run)
    session = Session.build(config)
    saved = checkpoint.newest(directory.checkpoints, upto=step)
    assert saved is not None
    done, window, state = saved
    assert done == step
    session.runtime.load_state(state, window)
    session.runtime.export(out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_has_the_bits_of_every_checkpoint(configure: Configure, tmp_path: Path, kind: str) -> None:
    run = train(configure, **KINDS[kind])
    before = contents(run)
    seen = set()
    # At the first step, around the ends of windows of 7, and at the end.
    for step in (1, 6, 7, 8, 16):
        out = tmp_path / f"step-{step}"
        done = zotune.replay(run, out, step)
        assert (done.step, done.comparison.step, done.comparison.same) == (step, step, True)  # type: ignore[union-attr]
        weights = load_file(out / "model.safetensors")
        assert_same(weights, exported(run, step, tmp_path / f"exported-{step}"))
        seen.add((out / "model.safetensors").read_bytes())
    assert len(seen) == 5
    assert contents(run) == before


def test_a_replay_needs_neither_data_nor_checkpoints(configure: Configure, tmp_path: Path) -> None:
    run = train(configure)
    expected = exported(run, 16, tmp_path / "expected")
    shutil.rmtree(run / "checkpoints")
    for rows in tmp_path.glob("*.jsonl"):
        rows.unlink()
    told: list[int] = []
    done = zotune.replay(run, tmp_path / "deep" / "out", progress=told.append)
    assert (done.step, done.comparison) == (16, None)
    assert told == list(range(1, 17))
    assert_same(load_file(done.path / "model.safetensors"), expected)
    model = AutoModelForCausalLM.from_pretrained(done.path)
    assert AutoTokenizer.from_pretrained(done.path)("the film")["input_ids"] == [0, 2]
    assert torch.equal(model.model.norm.weight, expected["model.norm.weight"])


def test_step_0_is_the_base_model(configure: Configure, tmp_path: Path, tiny_model_folder: Path) -> None:
    done = zotune.replay(train(configure), tmp_path / "out", 0)
    assert done.comparison is None
    assert_same(load_file(done.path / "model.safetensors"), load_file(tiny_model_folder / "model.safetensors"))


def test_the_base_model_may_have_moved(configure: Configure, tmp_path: Path, tiny_model_folder: Path) -> None:
    run = train(configure, method={"interval": 3})
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace(str(tiny_model_folder), "/gone/model"))
    with pytest.raises(ModelError, match="/gone/model"):
        zotune.replay(run, tmp_path / "out")
    moved = shutil.copytree(tiny_model_folder, tmp_path / "moved")
    done = zotune.replay(run, tmp_path / "out", model=str(moved), device="cpu")
    assert done.comparison is not None
    assert done.comparison.same


def test_a_checkpoint_that_the_journal_does_not_lead_to_shows(configure: Configure, tmp_path: Path) -> None:
    run = train(configure)
    path = run / "checkpoints"
    saved = checkpoint.newest(path)
    assert saved is not None
    _, window, state = saved
    other = {name: tensor.clone() for name, tensor in state.items()}
    other["factors"][3] += 0.25
    checkpoint.save(path, other, step=16, window=window, keep=99)
    found = zotune.replay(run, tmp_path / "out").comparison
    assert found is not None
    assert (found.step, found.same, found.differing) == (16, False, ("factors",))
    assert found.largest == pytest.approx(0.25)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_another_base_model_is_refused(configure: Configure, tmp_path: Path, tiny_model_folder: Path) -> None:
    run = train(configure)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
    model.save_pretrained(other)
    with pytest.raises(JournalError, match="is not the base model of this journal"):
        zotune.replay(run, tmp_path / "out", model=str(other))
    assert not (tmp_path / "out").exists()


def test_a_journal_of_other_sites_is_refused(configure: Configure, tmp_path: Path) -> None:
    """Mixed up from two runs: the records of one behind the header of another."""
    run = train(configure)
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    other = train(configure, output="linear", method={"scope": "linear"}) / "journal.jsonl"
    first = json.loads(other.read_bytes().splitlines()[0])
    del first["crc"]
    first["layout"] = json.loads(lines[0])["layout"]
    header = records.Header(**first)
    (run / "journal.jsonl").write_bytes(records.line(header) + b"".join(lines[1:]))
    with pytest.raises(JournalError, match="are not those of the journal"):
        zotune.replay(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_replayed_writes_nothing(configure: Configure, tmp_path: Path) -> None:
    run, out = train(configure), tmp_path / "out"
    for step in (-1, 17):
        with pytest.raises(ConfigError, match=r"has 16 finished steps.* from 0 to 16"):
            zotune.replay(run, out, step)
    with pytest.raises(ModelError, match="device 'gpu' is not there"):
        zotune.replay(run, out, device="gpu")
    with pytest.raises(JournalError, match="is not a run directory"):
        zotune.replay(tmp_path, out)
    assert not out.exists()
    out.mkdir()
    (out / "kept").touch()
    with pytest.raises(ConfigError, match="exists"):
        zotune.replay(run, out)
    assert [path.name for path in out.iterdir()] == ["kept"]
