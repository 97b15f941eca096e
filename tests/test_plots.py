from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from zotune import plots
from zotune.errors import JournalError


def step(number: int, loss: float | None) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss": loss, "seconds": 0.5, "rows_per_s": 31.0, "skipped": loss is None}


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
    figure = plots.draw(plots.read_metrics(run), title="a $run")
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
    assert len(plots.draw(plots.read_metrics(run), title="completions").axes) == 1
    assert plots.plot(run).exists()


def test_a_run_that_was_only_evaluated_can_be_drawn(tmp_path: Path) -> None:
    assert plots.plot(write(tmp_path, evaluation(0, 0.7, 0.5))).exists()


def test_a_torn_last_line_is_ignored(tmp_path: Path) -> None:
    whole = plots.read_metrics(write(tmp_path, step(1, 0.5)))
    assert plots.read_metrics(write(tmp_path, step(1, 0.5), tail='{"kind": "st')) == whole
    assert plots.read_metrics(write(tmp_path, step(1, 0.5), tail='{"kind": "step", "step": 2')) == whole


def test_the_later_of_two_lines_for_a_step_counts(tmp_path: Path) -> None:
    metrics = plots.read_metrics(write(tmp_path, step(1, 0.5), step(2, 0.4), step(1, 0.6)))
    assert [record["loss"] for record in metrics.steps] == [0.6, 0.4]


@pytest.mark.parametrize("line", ["{torn", "[1]", '{"kind": "step"}', '{"kind": "other", "step": 1}', ""])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    run = write(tmp_path, step(1, 0.5), tail=f"{line}\n" + json.dumps(step(2, 0.5)) + "\n")
    with pytest.raises(JournalError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        plots.plot(run)


def test_no_metrics_no_picture(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"is .* a run directory"):
        plots.plot(tmp_path)
    with pytest.raises(JournalError, match="nothing to draw"):
        plots.plot(write(tmp_path))
    assert not (tmp_path / "curves.png").exists()
