from __future__ import annotations

from pathlib import Path

import pytest

from zotune import durable


def test_a_file_is_replaced_and_no_draft_is_left(tmp_path: Path) -> None:
    for name in ("config.toml", "config.json"):
        (tmp_path / name).write_text("before")
        durable.replace(tmp_path / name, b"after")
        assert (tmp_path / name).read_bytes() == b"after"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["config.json", "config.toml"]


def test_a_draft_that_cannot_take_its_place_is_removed(tmp_path: Path) -> None:
    place = tmp_path / "taken"
    (place / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        durable.replace(place, b"content")
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]


def test_no_two_writers_share_a_draft(tmp_path: Path) -> None:
    drafts = [durable.draft_of(tmp_path / "a.json") for _ in range(100)]
    assert len(set(drafts)) == 100
    assert {(draft.parent, draft.name[:8], draft.suffix) for draft in drafts} == {(tmp_path, ".a.json.", ".part")}


def test_a_writer_that_is_interrupted_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(durable.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        durable.replace(tmp_path / "a.json", b"content")
    assert not list(tmp_path.iterdir())
