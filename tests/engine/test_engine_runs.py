"""Whole runs on vLLM: their journals and checkpoints are those of the embedded runtime, and the reverse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from tiny_runs import Recorder, configure

import zotune
from zotune.config import Config
from zotune.journal import read
from zotune.run import RunDirectory
from zotune.session import restore


@pytest.fixture(scope="module")
def wide_model_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads as wide as vLLM's attention wants them, and the same tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    config = AutoConfig.from_pretrained(tiny_model_folder)
    config.head_dim = 32
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def run_on(tmp_path: Path, wide_model_folder: Path, sentiment_files: tuple[Path, Path]) -> Callable[..., Config]:
    """Configures a run of 12 steps on a kind of runtime."""

    def chosen(kind: str, name: str, **runtime: Any) -> Config:
        return configure(
            tmp_path,
            wide_model_folder,
            sentiment_files,
            output=name,
            method={"lr": 1e-3, "eps": 1e-2, "interval": 5},
            train={"steps": 12, "checkpoint_every": 6, "eval_every": 6},
            runtime={"type": kind, "threads": None} | runtime,
        )

    return chosen


def _state(config: Config, on: Config) -> dict[str, torch.Tensor]:
    """What a run's journal gives on another runtime, without its checkpoints."""
    run = RunDirectory(Path(config.output))
    for each in run.checkpoints.iterdir():
        each.rename(each.with_name(f"hidden-{each.name}"))
    session, _ = restore(run, on)
    state = session.runtime.state()
    session.close()
    return state


def _checkpoint(config: Config) -> dict[str, torch.Tensor]:
    session, _ = restore(RunDirectory(Path(config.output)), config)
    state = session.runtime.state()
    session.close()
    return state


@pytest.mark.parametrize("preset", ["lozo", pytest.param("mezo", marks=pytest.mark.slow), "mezo-lora"])
def test_either_runtime_replays_the_other_ones_journal(run_on: Callable[..., Config], preset: str) -> None:
    method: dict[str, Any] = {} if preset == "lozo" else {"preset": preset, "interval": None}
    engine, embedded = (run_on(kind, kind).having("method", **method) for kind in ("vllm", "torch"))
    for config in (engine, embedded):
        zotune.start(config, Recorder())
    losses = [
        [entry.losses for entry in read(Path(config.output) / "journal.jsonl").entries] for config in (engine, embedded)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for made, other in ((engine, embedded), (embedded, engine)):
        saved, replayed = _checkpoint(made), _state(made, other)
        assert [name for name in saved if not torch.equal(saved[name], replayed[name])] == []


def test_without_its_bank_a_run_is_what_its_journal_says(run_on: Callable[..., Config], tmp_path: Path) -> None:
    banked = run_on("vllm", "run", vllm={"bank_rank": 8})
    zotune.start(banked, Recorder())
    run, told = RunDirectory(Path(banked.output)), []
    wider, none = (run_on("vllm", "run", vllm={"bank_rank": 16}), run_on("torch", "run"))
    for other in (none, wider, banked):
        session, _ = restore(run, other, notice=told.append)
        assert np.isfinite(session.evaluate().metrics.loss)
        session.close()
    assert ["bank_rank = 8, not" in each for each in told] == [True] * 4, "two checkpoints, each no use to two"
    zotune.export_run(run.path, tmp_path / "merged")
    zotune.export_run(run.path, tmp_path / "journal", "journal")
    zotune.apply_journal(banked.model.path, tmp_path / "journal", tmp_path / "applied")
    merged, applied = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "applied"))
    assert merged == applied


def test_an_interrupted_run_goes_on_to_the_same_bits(run_on: Callable[..., Config]) -> None:
    whole, parts = run_on("vllm", "whole"), run_on("vllm", "parts")
    zotune.start(whole, Recorder())
    with pytest.raises(KeyboardInterrupt):
        zotune.start(parts, Recorder(stop_after=8))
    zotune.resume(Path(parts.output), Recorder())
    journals = [(Path(config.output) / "journal.jsonl").read_text().splitlines()[1:] for config in (whole, parts)]
    assert journals[0] == journals[1]
    expected, state = _checkpoint(whole), _checkpoint(parts)
    assert all(torch.equal(expected[name], state[name]) for name in expected)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"compile": True}, r"vllm\.compile = true means nothing.*no captured graph"),
        ({"bank_rank": 8}, r"vllm\.bank_rank = 8 means nothing.*full rank.*low-rank preset, such as lozo"),
        ({"adapters": "lora"}, r"vllm\.adapters = lora means nothing.*slots"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_what_is_for_low_rank_directions_is_refused_for_others(
    run_on: Callable[..., Config], setting: dict[str, Any], message: str
) -> None:
    dense = run_on("vllm", "dense", vllm=setting).having("method", preset="mezo", interval=None)
    with pytest.raises(zotune.ZotuneError, match=message):
        zotune.start(dense, Recorder())
    assert not Path(dense.output).exists()
