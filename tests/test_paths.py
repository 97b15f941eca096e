"""Paths as people give them, at every public function that takes one."""

from __future__ import annotations

import os
import sys
from pathlib import Path, PurePosixPath

import pytest
import tiny_runs
from tiny_runs import Recorder

import zotune
from zotune import config
from zotune.errors import ConfigError
from zotune.paths import expand

NUL = "embedded null byte" if sys.version_info < (3, 13) else "stat: embedded null character in path"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that ``~`` and relative paths begin at."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(home: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]) -> Path:
    chosen = tiny_runs.configure(home, tiny_model_folder, sentiment_files, train={"steps": 2})
    return zotune.start(chosen, Recorder()).path


@pytest.mark.parametrize("begin", ["", "~/"], ids=["relative", "home"])
def test_what_is_done_with_a_run_takes_its_path_as_text(run: Path, tiny_model_folder: Path, begin: str) -> None:
    path, out = f"{begin}run", f"{begin}out"
    assert zotune.evaluate_run(path).examples == 24
    assert zotune.resume(path, Recorder()).path.samefile(run)
    assert zotune.plot(path).samefile(run / "curves.png")
    assert zotune.plot(path, f"{out}/curve.svg").samefile(run.parent / "out" / "curve.svg")
    assert zotune.overlay([path], f"{out}/overlay.png").samefile(run.parent / "out" / "overlay.png")
    assert zotune.write_report(path).samefile(run / "report.html")
    assert zotune.write_report(path, f"{out}/page.html").samefile(run.parent / "out" / "page.html")
    assert zotune.export_run(path, f"{out}/file", "journal").path.samefile(run.parent / "out" / "file")
    applied = zotune.apply_journal(tiny_model_folder, f"{out}/file", f"{out}/applied")
    assert applied.path.samefile(run.parent / "out" / "applied")
    assert zotune.replay(path, f"{out}/replayed", 1).step == 1
    assert (run.parent / "out" / "replayed" / "config.json").is_file()
    assert zotune.rollback(path, 1).steps == 2


@pytest.mark.parametrize("begin", ["", "~/"], ids=["relative", "home"])
def test_configurations_and_sweeps_are_read_from_a_path_as_text(home: Path, begin: str) -> None:
    table = {"output": "runs/a", "model": {"path": "some/model"}, "data": {"train": "rows.jsonl"}}
    (home / "config.toml").write_text(config.dump(zotune.parse_config(table)))
    (home / "sweep.toml").write_text(
        f'output = "{begin}runs"\nbase = "{begin}config.toml"\n[grid]\ntrain.seed = [0, 1]\n'
    )
    assert zotune.load_config(f"{begin}config.toml") == zotune.parse_config(table)
    assert [planned.path.name for planned in zotune.read_sweep(f"{begin}sweep.toml").runs] == ["seed=0", "seed=1"]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("~nosuchuser/x", "Could not determine home directory"),
        ("x" * 300, "File name too long"),
        ("x" * 300 + "/below", "File name too long"),
        ("nul\0", NUL),
    ],
)
def test_a_path_that_nothing_can_be_at_is_refused_in_one_line(path: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(path)
    assert str(caught.value) == f"cannot use the path {path!r}: {why}; give another one"


def test_a_path_need_not_exist(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for path in (tmp_path / "new", tmp_path / "new" / "below", tmp_path / "file" / "below", tmp_path / "nowhere"):
        assert expand(str(path)) == path


@pytest.mark.parametrize("kind", [str, Path, PurePosixPath])
def test_a_configuration_takes_path_objects_where_it_has_paths(kind: type[os.PathLike[str]]) -> None:
    table = {
        "output": kind("runs/a"),
        "model": {"path": kind("some/model")},
        "data": {"train": kind("rows.jsonl"), "validation": kind("others.jsonl")},
    }
    parsed = zotune.parse_config(table)
    assert (parsed.output, parsed.model.path) == ("runs/a", "some/model")
    assert (parsed.data.train, parsed.data.validation) == ("rows.jsonl", "others.jsonl")
    assert config.dump(parsed) == config.dump(zotune.parse_config(table | {"output": "runs/a"}))
