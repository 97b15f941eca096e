from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from zotune.errors import ConfigError, JournalError
from zotune.watching import metrics, plots


def step(number: int, loss: float | None) -> dict[str, Any]:
    record = {"kind": "step", "step": number, "loss": loss, "lr": 1e-6, "coefficients": [0.5]}
    return {**record, "seconds": 0.5, "rows_per_s": 31.0, "skipped": loss is None}


def evaluation(number: int, loss: float, accuracy: float | None) -> dict[str, Any]:
    return {"kind": "eval", "step": number, "loss": loss, "accuracy": accuracy, "seconds": 7.0}


def write(run: Path, *records: dict[str, Any], tail: str = "") -> Path:
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return run


def test_the_picture_is_a_png_of_two_panels(tmp_path: Path) -> None:
    run = write(tmp_path, evaluation(0, 0.7, 0.5), step(1, 0.69), step(2, 0.6), evaluation(2, 0.6, 0.75))
    picture = plots.plot(run)
    height, width, _ = imread(picture).shape
    assert picture == run / "curves.png"
    assert width > 2 * height
    assert "matplotlib.pyplot" not in sys.modules, "no global state"


def test_the_curves_hold_the_metrics(tmp_path: Path) -> None:
    run = write(tmp_path, evaluation(0, 0.7, 0.5), step(1, 0.8), step(2, None), step(3, 0.4), evaluation(3, 0.6, 0.75))
    figure = plots.draw(metrics.read(run), title="a $run")
    loss, accuracy = figure.axes
    batch, smoothed, validation = (list(line.get_ydata()) for line in loss.lines)
    assert batch == pytest.approx([0.8, math.nan, 0.4], nan_ok=True)
    assert smoothed == pytest.approx([0.8, 0.8, (0.95 * 0.8 + 0.4) / 1.95])
    assert validation == [0.7, 0.6]
    assert list(accuracy.lines[0].get_xdata()) == [0, 3]
    assert list(accuracy.lines[0].get_ydata()) == [0.5, 0.75]
    assert [text.get_text() for text in accuracy.texts] == ["75.0 %", "50.0 %"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "validation accuracy"]
    assert figure.get_suptitle() == "a $run"


def test_without_accuracy_there_is_one_panel(tmp_path: Path) -> None:
    run = write(tmp_path, evaluation(0, 2.5, None), step(1, 2.4), evaluation(1, 2.4, None))
    assert len(plots.draw(metrics.read(run), title="completions").axes) == 1
    assert plots.plot(run).exists()


def test_a_run_that_was_only_evaluated_can_be_drawn(tmp_path: Path) -> None:
    assert plots.plot(write(tmp_path, evaluation(0, 0.7, 0.5))).exists()


def test_no_metrics_no_picture(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"is .* a run directory"):
        plots.plot(tmp_path)
    with pytest.raises(JournalError, match="nothing to show"):
        plots.plot(write(tmp_path))
    assert not (tmp_path / "curves.png").exists()


def test_written_answers_are_drawn_like_accuracy(tmp_path: Path) -> None:
    scores = {"exact_match": 0.25, "f1": 0.5}
    run = write(tmp_path, evaluation(0, 2.5, None) | scores, step(1, 2.4), evaluation(1, 2.4, None) | scores)
    axes = plots.draw(metrics.read(run), title="answers").axes[1]
    assert axes.get_ylabel() == "validation f1"
    assert list(axes.lines[0].get_ydata()) == [0.5, 0.5]


def test_a_picture_can_lie_elsewhere_and_be_of_another_format(tmp_path: Path) -> None:
    run = write(tmp_path, evaluation(0, 0.7, 0.5), step(1, 0.69))
    out = plots.plot(run, tmp_path / "new" / "a.svg")
    assert out.read_text().startswith("<?xml")
    with pytest.raises(ConfigError, match=r"unknown picture format '\.pgn'. Did you mean '\.png'"):
        plots.plot(run, tmp_path / "a.pgn")
    with pytest.raises(ConfigError, match="cannot write the picture"):
        plots.plot(run, out / "a.png")
    assert not (run / "curves.png").exists()
