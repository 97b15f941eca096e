from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread
from tiny_runs import configure
from typer.testing import CliRunner

from zotune import cli, train
from zotune.errors import ConfigError, JournalError
from zotune.reporters import SilentReporter
from zotune.watching import overlays
from zotune.watching.metrics import RunMetrics
from zotune.watching.overlays import Curves, overlay

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]
) -> list[Path]:
    """Two runs that differ in learning rate and estimator, so in probes a step."""
    folder = tmp_path_factory.mktemp("runs")
    for name, method in (("a", {"lr": 1e-3}), ("b", {"lr": 1e-4, "estimator": "one-sided", "directions": 4})):
        tables: dict[str, Any] = {"method": method, "train": {"steps": 4, "eval_every": 2}}
        train.start(configure(folder, tiny_model_folder, sentiment_files, output=name, **tables), SilentReporter())
    return [folder / "a", folder / "b"]


def test_the_picture_names_what_differs(runs: list[Path], tmp_path: Path) -> None:
    out = overlay(runs, tmp_path / "both.svg")
    text = out.read_text()
    assert "<!-- lr 0.001, directions 1, estimator two-point -->" in text
    assert "<!-- lr 0.0001, directions 4, estimator one-sided -->" in text
    height, width, _ = imread(overlay(runs, tmp_path / "both.png")).shape
    assert width > 3 * height


@pytest.mark.parametrize("x", ["steps", "seconds", "forwards"])
def test_the_x_axis_counts_what_is_asked_for(runs: list[Path], x: overlays.Axis) -> None:
    first, second = overlays._curves(runs, x)
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if line["kind"] == "step"]
    expected = {"steps": 3, "seconds": sum(seconds[:3]), "forwards": 3 * 5}[x]
    assert second.at(3) == pytest.approx(expected)
    assert first.at(0) == second.at(0) == 0
    figure = overlays.draw([first, second], x)
    assert [axes.get_xlabel() for axes in figure.axes] == 3 * [
        {"seconds": "seconds of training", "steps": "step"}.get(x, x)
    ]
    training, loss, accuracy = figure.axes
    assert list(training.lines[1].get_xdata()) == pytest.approx([second.at(step) for step in (1, 2, 3, 4)])
    assert list(loss.lines[1].get_xdata()) == pytest.approx([second.at(step) for step in (0, 2, 4)])
    assert list(accuracy.lines[0].get_ydata()) == [record["accuracy"] for record in first.metrics.evaluations]


def test_many_runs_can_be_told_apart() -> None:
    steps = ({"step": 1, "loss": 0.5, "seconds": 0.1},)
    figure = overlays.draw([Curves(f"_run ${n}", RunMetrics(steps, ()), float) for n in range(28)])
    assert len(figure.axes) == 2, "no score, no panel for it"
    looks = {(to_hex(line.get_color()), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 28
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"_run ${n}" for n in range(28)]
    assert not any(text.get_parse_math() for text in legend.get_texts()), "two dollars in a name are no formula"


def test_runs_of_the_same_name_keep_their_paths(runs: list[Path], tmp_path: Path) -> None:
    twin = tmp_path / "a"
    twin.symlink_to(runs[0])
    assert [each.label for each in overlays._curves([runs[0], twin], "steps")] == [str(runs[0]), str(twin)]


def test_what_cannot_be_drawn_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown x axis 'tokens'"):
        overlay(runs, tmp_path / "a.png", "tokens")  # type: ignore[arg-type]
    with pytest.raises(JournalError, match="is not a run directory"):
        overlay([*runs, tmp_path], tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_the_command_draws_one_run_or_several(runs: list[Path], tmp_path: Path) -> None:
    def plot(*words: object) -> dict[str, Any]:
        done = CliRunner().invoke(cli.app, ["plot", *map(str, words), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    assert plot(runs[0]) == {"run": str(runs[0]), "plot": str(runs[0] / "curves.png")}
    out = tmp_path / "both.pdf"
    assert plot(*runs, "--out", out, "--x", "forwards") == {"runs": [str(run) for run in runs], "plot": str(out)}
    assert out.read_bytes().startswith(b"%PDF")
