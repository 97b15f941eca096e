from __future__ import annotations

from pathlib import Path

import pytest

from zotune.bench import results
from zotune.errors import DataError

CASE = {"model": "opt-125m", "batch": 16}


def test_a_result_is_found_again_by_its_case_alone(tmp_path: Path) -> None:
    kept = results.Results(tmp_path / "new", "scaling")
    assert kept.find(CASE) is None
    kept.add(CASE, {"step_s": 1.5})
    found = kept.find({"batch": 16, "model": "opt-125m"})
    assert found is not None
    assert (found.kind, found.case, found.figures) == ("scaling", CASE, {"step_s": 1.5})
    assert kept.find(CASE | {"batch": 32}) is None
    assert results.Results(tmp_path / "new", "overhead").find(CASE) is None


def test_a_case_measured_again_replaces_its_result(tmp_path: Path) -> None:
    kept = results.Results(tmp_path, "scaling")
    for seconds in (1.0, 2.0):
        kept.add(CASE, {"step_s": seconds})
    (only,) = results.every(tmp_path)
    assert only.figures == {"step_s": 2.0}


@pytest.mark.parametrize("name", ["file", "file/results"])
def test_a_folder_that_cannot_be_one_is_refused_before_anything_is_measured(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=f"cannot write {tmp_path / name}: {tmp_path / 'file'} is no folder"):
        results.Results(tmp_path / name, "scaling")


def test_a_result_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    kept = results.Results(tmp_path / "new", "scaling")
    (tmp_path / "new").write_text("mine")
    with pytest.raises(DataError, match=f"cannot write {tmp_path / 'new'}: File exists"):
        kept.add(CASE, {"step_s": 1.0})


def test_a_result_says_where_it_was_measured(tmp_path: Path) -> None:
    machine = results.Results(tmp_path, "scaling").add(CASE, {}).machine
    assert machine["cpu"]
    assert machine["versions"]["torch"]
    assert {"commit", "date", "command", "threads", "gpu"} <= set(machine)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        pytest.param("[" * 9999, id="deep"),
        '{"kind": "scaling"}',
        '{"kind":"a","case":1,"figures":{},"machine":{}}',
    ],
)
def test_a_damaged_result_is_named_and_left(tmp_path: Path, text: str) -> None:
    kept = results.Results(tmp_path, "scaling")
    kept.add(CASE, {})
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    for read in (lambda: results.every(tmp_path), lambda: kept.find(CASE)):
        with pytest.raises(DataError, match=rf"{path} is not a result of zotune bench"):
            read()
    assert path.read_text() == text


def test_a_file_that_was_never_a_result_is_named_and_left_out(tmp_path: Path) -> None:
    kept = results.Results(tmp_path, "scaling").add(CASE, {"step_s": 1.0})
    (written,) = tmp_path.iterdir()
    written.rename(tmp_path / "mine.json")
    for name, text in (("notes.json", '{"todo": []}'), ("half.json", "{")):
        (tmp_path / name).write_text(text)
    told: list[str] = []
    assert results.every(tmp_path, told.append) == [kept]
    assert [text.split(" is left out")[0] for text in told] == [
        str(tmp_path / name) for name in ("half.json", "notes.json")
    ]


def test_a_folder_without_results_says_what_writes_some(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no results"):
        results.every(tmp_path)
    with pytest.raises(DataError, match="no folder"):
        results.every(tmp_path / "none")
