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
