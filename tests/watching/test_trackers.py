from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Recorder, configure

from zotune import train
from zotune.config import Config, parse
from zotune.errors import ConfigError
from zotune.reporters import SilentReporter
from zotune.watching import trackers
from zotune.watching.trackers import Figures, Tracker

TENSORBOARD = {"tensorboard": True}

pytestmark = pytest.mark.usefixtures("one_thread")


def events(run: Path) -> list[Any]:
    """What TensorBoard would read of a run: every record of its one event file, checksums passed over."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = (run / "tensorboard").iterdir()
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def curve(run: Path, tag: str) -> dict[int, float]:
    points = [
        (event.step, value.simple_value)
        for event in events(run)
        for value in event.summary.value
        if value.tag == tag and not value.tensor.string_val
    ]
    assert len({step for step, _ in points}) == len(points), "a step is there twice"
    return dict(points)


def settings(**track: Any) -> Config:
    return parse({"output": "run", "model": {"path": "m"}, "data": {}, "track": track})


class Memory:
    """A sink that keeps what it is told, and can fail."""

    name = "Memory"
    rewrites = False

    def __init__(self, fails_at: str | None = None) -> None:
        self.told: list[tuple[int, Figures]] = []
        self.closed = 0
        self.fails_at = fails_at

    def open(self, path: Path, config: Config) -> None:
        if self.fails_at == "open":
            raise OSError(13, "Permission\ndenied")

    def log(self, step: int, figures: Figures, when: float) -> None:
        if self.fails_at == "log":
            raise OSError(28, "No space left on device")
        self.told.append((step, figures))

    def close(self) -> None:
        self.closed += 1


def step(number: int, loss: float | None, coefficients: list[float]) -> dict[str, Any]:
    record = {"kind": "step", "step": number, "loss": loss, "lr": 1e-3, "coefficients": coefficients}
    return {**record, "seconds": 0.5, "rows_per_s": None, "skipped": loss is None}


def evaluation(number: int, **scores: float | None) -> dict[str, Any]:
    return {"kind": "eval", "step": number, "loss": 0.5, "accuracy": None, "examples": 9, "seconds": 1.0, **scores}


def test_tensorboard_is_on_unless_turned_off_and_wandb_is_off_unless_asked_for() -> None:
    assert [tracker._sink.name for tracker in trackers.build(settings())] == ["TensorBoard"]  # type: ignore[attr-defined]
    assert trackers.build(settings(tensorboard=False)) == []


def test_wandb_that_is_not_installed_is_refused_before_anything_is_made(
    tmp_path: Path,
    tiny_model_folder: Path,
    sentiment_files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As the import system has it for a package that must not be found.
    monkeypatch.setitem(sys.modules, "wandb", None)
    chosen = configure(tmp_path, tiny_model_folder, sentiment_files, track={"wandb": "project"})
    with pytest.raises(ConfigError, match=r"track\.wandb needs the package wandb.*pip install wandb"):
        train.start(chosen, SilentReporter())
    assert not (tmp_path / "run").exists()


def test_figures_are_finite_and_named_by_split() -> None:
    sink = Memory()
    tracker = Tracker(sink, settings(), print)
    tracker.start(Path("nowhere"), 3, 0)
    tracker.evaluation(evaluation(0, exact_match=0.25, f1=0.5))
    tracker.step(step(1, 0.8, [3.0, -4.0]))
    tracker.step(step(2, None, []))
    tracker.step(step(3, 0.4, [1.0]))
    assert sink.told[0] == (0, {"validation/loss": 0.5, "validation/exact_match": 0.25, "validation/f1": 0.5})
    assert sink.told[1][1]["train/coefficient_rms"] == pytest.approx((25 / 2) ** 0.5)
    assert sink.told[2] == (2, {"train/loss_smoothed": pytest.approx(0.8), "train/lr": 1e-3})
    assert sink.told[3][1]["train/loss_smoothed"] == pytest.approx((0.95 * 0.8 + 0.4) / 1.95)


def test_a_sink_that_fails_in_the_middle_is_left_out_with_one_notice() -> None:
    notices: list[str] = []
    sink = Memory(fails_at="log")
    tracker = Tracker(sink, settings(), notices.append)
    tracker.start(Path("nowhere"), 3, 0)
    tracker.step(step(1, 0.8, [1.0]))
    tracker.step(step(2, 0.8, [1.0]))
    tracker.finish()
    assert notices == ["Memory failed and is left out from here on: [Errno 28] No space left on device"]
    assert sink.closed == 0


def test_a_sink_that_cannot_begin_says_how_to_go_on() -> None:
    tracker = Tracker(Memory(fails_at="open"), settings(), print)
    with pytest.raises(
        ConfigError, match=r"Memory cannot be used: \[Errno 13\] Permission denied\. .*zotune resume runs"
    ):
        tracker.start(Path("runs/a"), 3, 0)


def test_event_files_hold_what_the_metrics_say(
    tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]
) -> None:
    train.start(
        configure(tmp_path, tiny_model_folder, sentiment_files, train={"steps": 6}, track=TENSORBOARD), SilentReporter()
    )
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for tag, key in (("train/loss", "loss"), ("train/lr", "lr"), ("train/rows_per_s", "rows_per_s")):
        expected = {line["step"]: line[key] for line in lines if line["kind"] == "step"}
        assert curve(run, tag) == pytest.approx(expected)
        assert len(expected) == 6
    for key in ("loss", "accuracy"):
        expected = {line["step"]: line[key] for line in lines if line["kind"] == "eval"}
        assert curve(run, f"validation/{key}") == pytest.approx(expected)
    (text,) = (
        value.tensor.string_val[0] for event in events(run) for value in event.summary.value if value.HasField("tensor")
    )
    assert b"    lr = 0.001\n" in text


@pytest.mark.parametrize("left", ["whole", "torn", "behind"])
def test_a_resumed_run_has_each_step_once(
    left: str, tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]
) -> None:
    chosen = configure(tmp_path, tiny_model_folder, sentiment_files, train={"steps": 6}, track=TENSORBOARD)
    with pytest.raises(KeyboardInterrupt):
        train.start(chosen, Recorder(stop_after=3))
    run = tmp_path / "run"
    before = curve(run, "train/loss")
    # As a killed process leaves it: the last events never reached the file, or the last step only the journal.
    if left == "torn":
        (path,) = (run / "tensorboard").iterdir()
        path.write_bytes(path.read_bytes()[:100])
    if left == "behind":
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < 3))
    train.resume(run, SilentReporter())
    after = curve(run, "train/loss")
    assert list(after) == [1, 2, 3, 4, 5, 6]
    assert {number: after[number] for number in before} == before
    when = [event.wall_time for event in events(run)[2:]]
    assert when == sorted(when)


def test_wandb_keeps_one_run_through_a_resume(
    tmp_path: Path,
    tiny_model_folder: Path,
    sentiment_files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real package, without a network."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    chosen = configure(tmp_path, tiny_model_folder, sentiment_files, train={"steps": 4}, track={"wandb": "films"})
    with pytest.raises(KeyboardInterrupt):
        train.start(chosen, SilentReporter(), callbacks=[Recorder(stop_after=2)])
    train.resume(tmp_path / "run", SilentReporter())
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1, "another run than before the interruption"
    assert sorted(number for path in files for number in _wandb_steps(path)) == [0, 1, 2, 3, 4]


def _wandb_steps(path: Path) -> set[int]:
    """The steps for which an offline file of Weights & Biases has figures.

    The file is a log of the form of LevelDB: after 7 bytes, 32 KiB blocks of records: checksum, length, kind, data.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, steps = path.read_bytes(), 7, b"", set()
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record, whole = Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                steps.add(record.history.step.num)
    return steps
