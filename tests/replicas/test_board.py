from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import Recorder, configure
from typer.testing import CliRunner

import zotune
from zotune import cli, config
from zotune.journal import locked
from zotune.runtimes.replicas.board import Board
from zotune.watching.sweep.plan import Planned
from zotune.watching.sweep.work import whereabouts


def test_a_wish_counts_from_when_the_board_is_there(tmp_path: Path) -> None:
    Board(tmp_path).want(9)
    board = Board(tmp_path)
    assert board.wanted() is None, "the configuration, which has it, may have been edited since"
    Board(tmp_path).want(9)
    assert board.wanted() == 9, "it was asked for once more"


@pytest.mark.parametrize("text", ["", "{", pytest.param("[" * 9999, id="deep")])
def test_files_that_are_damaged_say_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "replicas.json").write_text(text)
    (tmp_path / "scale.json").write_text(text)
    board = Board(tmp_path)
    assert board.read() == {}
    assert board.wanted() is None


def test_what_was_asked_for_is_what_a_run_is_resumed_with(
    tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]
) -> None:
    run = tmp_path / "run"
    zotune.start(configure(tmp_path, tiny_model_folder, sentiment_files, train={"steps": 1}), Recorder())
    file = run / "config.toml"
    file.write_text(file.read_text().replace('type = "torch"', 'type = "ray"'))
    planned = Planned("run", {}, config.load(file))
    (run / "replicas.json").write_text(json.dumps({"wanted": 2, "replicas": []}))
    with locked(run / "journal.jsonl"):
        shown = CliRunner().invoke(cli.app, ["scale", str(run), "--replicas", "3", "--json"])
    assert json.loads(shown.stdout) == {"run": str(run), "live": True, "wanted": 3, "replicas": []}
    assert config.load(file).runtime.ray.replicas == 3
    assert whereabouts(planned).state == "finished", "it is still the run that a sweep planned"
