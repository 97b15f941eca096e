from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from tiny_runs import Recorder, assert_same, contents, restored, saved

import zotune
from zotune import config, journal
from zotune.config import Config
from zotune.errors import ConfigError, DataError, DivergedError
from zotune.protocol import Update
from zotune.run import RunDirectory, resolved
from zotune.runtimes import blueprint
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.session import Session

Configure = Callable[..., Config]

METHODS: dict[str, dict[str, Any]] = {
    "lozo": {"preset": "lozo", "interval": 7, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 3},
    "lozo-m": {"preset": "lozo-m", "interval": 7, "directions": 2},
    "mezo": {"preset": "mezo", "lr": 3e-4},
    "mezo-factorized": {"preset": "mezo-factorized", "lr": 3e-4, "rank": 4, "estimator": "one-sided"},
}
KINDS = [
    ("lozo", "float32", "stochastic"),
    ("lozo", "bfloat16", "stochastic"),
    ("lozo-m", "bfloat16", "master"),
    ("lozo-m", "float32", "stochastic"),
    ("mezo", "bfloat16", "stochastic"),
    ("mezo-factorized", "bfloat16", "master"),
]


@pytest.fixture
def configure(tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]) -> Configure:
    return partial(tiny_runs.configure, tmp_path, tiny_model_folder, sentiment_files)


def test_each_step_is_what_the_step_before_told_the_runtime_to_expect(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    expected: list[Any] = []

    def expect(self: EmbeddedRuntime, probes: Any, rows: Any, *, normalised: bool = True) -> None:
        expected.append((list(probes), list(rows), normalised))

    def score(self: EmbeddedRuntime, probes: Any, rows: Any, *, normalised: bool = True) -> Any:
        asked.append((list(probes), list(rows), normalised))
        return scored(self, probes, rows, normalised=normalised)

    scored = EmbeddedRuntime.score
    monkeypatch.setattr(EmbeddedRuntime, "expect", expect)
    monkeypatch.setattr(EmbeddedRuntime, "score", score)
    zotune.start(configure(method={"interval": 3}, train={"steps": 8, "batch_size": 4, "eval_every": 3}))
    steps = [each for each in asked if len(each[0]) > 1 and len(each[1]) == 4]
    assert len(steps) == len(expected) == 8
    assert steps[1:] == expected[:-1]


def test_a_run_learns_and_its_summary_is_its_metrics(configure: Configure, tmp_path: Path) -> None:
    seen = Recorder()
    method = {"lr": 2e-3, "eps": 1e-2, "directions": 4, "interval": 10}
    chosen = configure(method=method, train={"steps": 60, "batch_size": 16, "eval_every": 25})
    summary = zotune.start(chosen, seen)
    assert summary.first.accuracy is not None
    assert summary.first.accuracy < 0.7
    assert summary.last.accuracy == 1
    assert summary.last.loss < 0.5 * summary.first.loss

    assert [record["step"] for record in seen.steps] == list(range(1, 61))
    assert [record["step"] for record in seen.evaluations] == [0, 25, 50, 60]
    last = seen.evaluations[-1]
    assert (summary.last.loss, summary.last.accuracy, summary.last.examples) == (last["loss"], last["accuracy"], 24)
    assert (summary.steps, summary.skipped) == (60, 0)
    assert summary.seconds == pytest.approx(sum(record["seconds"] for record in seen.steps), abs=0.01)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if line["kind"] == "step"] == seen.steps
    assert [line for line in lines if line["kind"] == "eval"] == seen.evaluations


def test_completions_are_learnt(configure: Configure) -> None:
    data = {"prompt": "the", "completion": "{text}", "candidates": None, "label": None}
    method = {"lr": 2e-3, "eps": 1e-2, "directions": 4, "interval": 10}
    summary = zotune.start(configure(data=data, method=method, train={"steps": 60, "batch_size": 16}), Recorder())
    assert summary.last.loss < 0.95 * summary.first.loss
    assert summary.last.accuracy is None


def test_a_seed_makes_a_run(configure: Configure, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("other", 1)):
        zotune.start(configure(output=name, train={"seed": seed}), Recorder())
    a, b, other = (tmp_path / name for name in ("a", "b", "other"))
    assert (a / "journal.jsonl").read_bytes() == (b / "journal.jsonl").read_bytes()
    assert_same(saved(a), saved(b))
    batches = [[entry.batch for entry in journal.read(run / "journal.jsonl")[1]] for run in (a, other)]
    assert batches[0] != batches[1]
    assert not torch.equal(saved(a)["factors"], saved(other)["factors"])


@pytest.mark.parametrize(("name", "dtype", "fold"), KINDS)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    configure: Configure, tmp_path: Path, name: str, dtype: str, fold: str
) -> None:
    kind: dict[str, Any] = {"method": METHODS[name], "model": {"dtype": dtype}, "runtime": {"fold": fold}}
    zotune.start(configure(output="whole", **kind), Recorder())
    with pytest.raises(KeyboardInterrupt):
        zotune.start(configure(output="parts", train={"checkpoint_every": 10}, **kind), Recorder(stop_after=3))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # Within the first window, at the ends of windows of 7, on both sides of them, and at a checkpoint.
    for stop in (6, 7, 8, 10, 14, 21, 27):
        with pytest.raises(KeyboardInterrupt):
            zotune.resume(parts, Recorder(stop_after=stop))
        assert len(journal.read(parts / "journal.jsonl")[1]) == stop
    summary = zotune.resume(parts, Recorder())
    assert (summary.steps, summary.skipped) == (30, 0)
    assert (parts / "journal.jsonl").read_bytes() == (whole / "journal.jsonl").read_bytes()
    assert_same(saved(parts), saved(whole))
    assert any(not torch.equal(a, b) for a, b in zip(saved(whole).values(), _base(whole).values(), strict=True))

    # The journal alone, from the base model on, without a checkpoint.
    shutil.rmtree(parts / "checkpoints")
    assert_same(restored(parts), saved(whole))


def _base(run: Path) -> dict[str, torch.Tensor]:
    built = Session.build(config.load(run / "config.toml"))
    return built.runtime.state()


def test_a_run_says_once_that_16_bits_round_its_probes_away(configure: Configure) -> None:
    seen = Recorder()
    in_16_bits = {"model": {"dtype": "bfloat16"}, "train": {"steps": 2}}
    zotune.start(configure(method={"eps": 1e-4}, **in_16_bits), seen)
    assert (
        sum("than the preset 'lozo' has: method.eps = 0.0001 (there 0.001)" in notice for notice in seen.notices) == 1
    )
    assert sum("method.eps = 0.0001 is below 0.001" in notice for notice in seen.notices) == 1
    seen = Recorder()
    zotune.start(configure(output="far", method={"eps": 1e-3}, **in_16_bits), seen)
    zotune.start(configure(output="exact", method={"eps": 1e-4}, train={"steps": 2}), seen)
    assert not any("is below" in notice for notice in seen.notices)


def test_a_finished_run_has_nothing_left_to_do(configure: Configure, tmp_path: Path) -> None:
    done = zotune.start(configure(), Recorder())
    kept = contents(tmp_path / "run")
    seen = Recorder()
    again = zotune.resume(tmp_path / "run", seen)
    assert (again.first, again.last, again.steps, again.seconds) == (done.first, done.last, 30, 0)
    assert seen.steps == []
    assert contents(tmp_path / "run") == kept


def test_a_checkpoint_ahead_of_the_journal_is_not_used(configure: Configure, tmp_path: Path) -> None:
    zotune.start(configure(), Recorder())
    path = tmp_path / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:21]))
    expected = saved(tmp_path / "run")
    zotune.resume(tmp_path / "run", Recorder())
    assert path.read_bytes() == b"".join(lines)
    assert_same(saved(tmp_path / "run"), expected)


def test_a_token_without_an_embedding_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]
) -> None:
    from transformers import AutoTokenizer

    model = shutil.copytree(tiny_model_folder, tmp_path / "model")
    finished = tiny_runs.configure(tmp_path, model, sentiment_files, output="finished", train={"steps": 2})
    zotune.start(finished, Recorder())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"new{number}" for number in range(64)])
    tokenizer.save_pretrained(model)
    settings = tmp_path / "finished" / "config.toml"
    settings.write_text(settings.read_text().replace("{text}", "{text} new63"))
    chosen = tiny_runs.configure(tmp_path, model, sentiment_files, data={"prompt": "{text} new63"})
    before = contents(tmp_path)
    for command in (
        lambda: zotune.start(chosen),
        lambda: zotune.dry_run(chosen),
        lambda: zotune.evaluate_run(tmp_path / "finished"),
    ):
        with pytest.raises(
            DataError, match=r"^row \d+ of train\.jsonl: the token 'new63' has the id \d+, but the model"
        ):
            command()
    assert contents(tmp_path) == before


def test_a_step_is_in_the_journal_before_it_is_applied(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zotune.start(configure(output="whole"), Recorder())

    class Fails(EmbeddedRuntime):
        def apply(self, update: Update) -> None:
            if update.step == 12:
                raise MemoryError
            super().apply(update)

    with monkeypatch.context() as patch:
        patch.setattr(blueprint, "EmbeddedRuntime", Fails)
        with pytest.raises(MemoryError):
            zotune.start(configure(), Recorder())
    entries = journal.read(tmp_path / "run" / "journal.jsonl")[1]
    assert entries[-1].step == 12
    zotune.resume(tmp_path / "run", Recorder())
    assert_same(saved(tmp_path / "run"), saved(tmp_path / "whole"))


def test_probes_too_near_to_differ_are_told_as_that(configure: Configure) -> None:
    chosen = configure(method={"preset": "fzoo", "eps": 1e-12, "lr": 1e-4}, train={"max_skipped": 3})
    with pytest.raises(
        DivergedError,
        match=r"3 steps in a row had no estimate.*all the same, or too far apart\. Set another method\.eps",
    ):
        zotune.start(chosen, Recorder())


def test_a_model_that_has_fallen_apart_is_told_as_that(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its losses are finite, and the same whatever the direction."""

    def score(self: EmbeddedRuntime, probes: Any, rows: Any, *, normalised: bool = True) -> Any:
        return np.zeros((len(probes), sum(len(row.candidates) for row in rows)), dtype=np.float32)

    monkeypatch.setattr(EmbeddedRuntime, "score", score)
    seen = Recorder()
    zotune.start(configure(train={"max_skipped": 3, "steps": 8}), seen)
    told = [text for text in seen.notices if "no direction has changed the loss" in text]
    assert len(told) == 1, "once for as long as it lasts"
    assert re.search(r"in 3 steps, up to step 3: .*method\.lr too high", told[0])


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([print], r"is no callback: .* methods start, step, evaluation, notice, finish.*zotune\.SilentReporter"),
        ([Recorder], r"the class Recorder is no callback"),
        (Recorder(), r"callbacks must be a list"),
    ],
    ids=["function", "class", "no list"],
)
def test_what_is_no_callback_is_refused_before_anything_is_there(
    configure: Configure, tmp_path: Path, callbacks: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        zotune.start(configure(), callbacks=callbacks)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("preset", "directions"), [("lozo-m", 1), ("mezo", 1), ("mezo", 3)])
def test_a_run_that_diverges_ends_and_stays_valid(
    configure: Configure, tmp_path: Path, preset: str, directions: int
) -> None:
    seen = Recorder()
    chosen = configure(
        method={"preset": preset, "lr": 1e38, "directions": directions},
        train={"max_skipped": 5, "checkpoint_every": 1, "keep_checkpoints": 9},
    )
    with pytest.raises(DivergedError, match=r"not finite in 5 steps in a row.*Lower method\.lr"):
        zotune.start(chosen, seen)
    run = tmp_path / "run"
    entries = journal.read(run / "journal.jsonl")[1]
    skipped = [entry for entry in entries if not entry.coefficients]
    assert skipped[-5:] == entries[-5:]
    assert 5 < len(entries) < 30
    assert all(not math.isfinite(loss) for entry in skipped for loss in entry.losses)
    record = json.loads((run / "journal.jsonl").read_text().splitlines()[-1])
    assert (record["losses"], record["coefficients"]) == ([None, None] * directions, [])

    assert [record["step"] for record in seen.steps if record["loss"] is None] == [entry.step + 1 for entry in skipped]
    assert all(record["skipped"] == (record["loss"] is None) == (not record["coefficients"]) for record in seen.steps)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    before, *later = sorted((run / "checkpoints").iterdir())[-5:]
    for each in later:
        assert (each / "state.safetensors").read_bytes() == (before / "state.safetensors").read_bytes()

    assert zotune.evaluate_run(run).examples == 24
    zotune.plot(run)
    with pytest.raises(DivergedError):
        zotune.resume(run, Recorder())
    assert len(journal.read(run / "journal.jsonl")[1]) == len(entries) + 1


def test_skipped_steps_that_are_not_in_a_row_are_counted(
    configure: Configure, tmp_path: Path, sentiment_files: tuple[Path, Path]
) -> None:
    """One row in 48 has a word whose embedding is not a number, so one batch in twelve has no loss."""
    chosen = configure(train={"max_skipped": 2, "steps": 36}, method={"scope": "linear"})
    rows = (tmp_path / sentiment_files[0].name).read_text().splitlines()
    rows[0] = json.dumps({"text": "It was", "label": 0})
    (tmp_path / sentiment_files[0].name).write_text("\n".join(rows))
    poisoned = tmp_path / "poisoned"
    _with_weight(Path(chosen.model.path), poisoned, "It", math.nan)
    seen = Recorder()
    summary = zotune.start(_with_model(chosen, poisoned), seen)
    assert summary.skipped == 3
    assert [record["step"] for record in seen.steps if record["skipped"]] == [
        entry.step + 1 for entry in journal.read(tmp_path / "run" / "journal.jsonl")[1] if not entry.coefficients
    ]
    assert math.isfinite(summary.last.loss)
    assert_same(restored(tmp_path / "run"), saved(tmp_path / "run"))


def _with_model(chosen: Config, path: Path) -> Config:
    return chosen.having("model", path=str(path))


def _with_weight(source: Path, target: Path, word: str, value: float) -> None:
    """A copy of a model in which the embedding of one word has one value throughout."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(source, target)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.get_input_embeddings().weight[AutoTokenizer.from_pretrained(source).vocab[word]] = value
    model.save_pretrained(target)


def test_an_infinite_weight_ends_the_run(configure: Configure, tmp_path: Path) -> None:
    chosen = configure(train={"max_skipped": 3})
    _with_weight(Path(chosen.model.path), tmp_path / "broken", "the", math.inf)
    _with_weight(tmp_path / "broken", tmp_path / "both", "a", math.inf)
    seen = Recorder()
    with pytest.raises(DivergedError, match="3 steps in a row, up to step 3"):
        zotune.start(_with_model(chosen, tmp_path / "both"), seen)
    assert [record["loss"] for record in seen.evaluations] == [None]
    assert RunDirectory(tmp_path / "run").evaluations()[0].accuracy == 0


def test_progress_is_printed_unless_a_reporter_is_given(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = configure(train={"steps": 2})
    zotune.start(chosen)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run {tmp_path / 'run'}: 2 steps"
    assert lines[-1].startswith("step 2/2  loss ")
    zotune.resume(tmp_path / "run", steps=4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run {tmp_path / 'run'}: 4 steps, 2 done"
    assert lines[-1].startswith("step 4/4  loss ")
    zotune.start(configure(output="silent", train={"steps": 2}), zotune.SilentReporter())
    assert capsys.readouterr().out == ""


def test_a_calibrated_method_steps_by_another_loss_and_is_judged_by_the_plain_one(configure: Configure) -> None:
    plain = Session.build(resolved(configure(output="plain")))
    fitted = Session.build(resolved(configure(output="fitted", method={"calibrated": True})))
    proposal, (examples, _) = plain.optimizer.ask(0), plain.batch(0)
    assert all(c < p for c, p in zip(fitted.losses(proposal, examples), plain.losses(proposal, examples), strict=True))
    assert fitted.evaluate().metrics == plain.evaluate().metrics
