from __future__ import annotations

import os
from pathlib import Path

import pytest

from zotune.errors import ConfigError
from zotune.export.drafts import drafted

folders = pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])


def fill(draft: Path) -> None:
    (draft / "weights" if draft.is_dir() else draft).write_text("whole")


@folders
def test_a_draft_takes_its_place_when_it_is_complete(tmp_path: Path, folder: bool) -> None:
    out = tmp_path / "not" / "there" / "yet"
    with drafted(out, folder=folder) as draft:
        fill(draft)
        assert not out.exists()
    assert (out / "weights" if folder else out).read_text() == "whole"
    assert list(out.parent.iterdir()) == [out]


@folders
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_draft_that_is_given_up(tmp_path: Path, folder: bool, error: type[BaseException]) -> None:
    def give_up() -> None:
        with drafted(tmp_path / "out", folder=folder) as draft:
            fill(draft)
            raise error

    with pytest.raises(error):
        give_up()
    assert list(tmp_path.iterdir()) == []


@folders
def test_what_exists_is_refused_before_anything_is_made(tmp_path: Path, folder: bool) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is left as it is"), drafted(tmp_path / "out", folder=folder):
        pytest.fail("it must not begin")
    assert (tmp_path / "out").read_text() == "mine"


@folders
def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path, folder: bool) -> None:
    """Its number may be ours, in another container or since the machine was started anew."""
    left = tmp_path / f".out.{os.getpid()}.part"
    left.mkdir()
    with drafted(tmp_path / "out", folder=folder) as draft:
        fill(draft)
    assert set(tmp_path.iterdir()) == {left, tmp_path / "out"}


@folders
def test_a_link_to_nothing_is_left_as_it_is(tmp_path: Path, folder: bool) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists and is left as it is"), drafted(tmp_path / "out", folder=folder):
        pytest.fail("it must not begin")
    assert (tmp_path / "out").readlink() == tmp_path / "nowhere"
