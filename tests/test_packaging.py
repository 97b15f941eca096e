"""What is installed is all that is needed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import zotune

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src"


def test_a_wheel_has_every_file_that_is_no_module() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {
        path
        for package, patterns in wanted.items()
        for pattern in patterns
        for path in SOURCES.joinpath(*package.split(".")).glob(pattern)
    }
    others = {path for path in (SOURCES / "zotune").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert packed == others


def test_type_checkers_and_editors_see_what_is_imported() -> None:
    assert (SOURCES / "zotune" / "py.typed").is_file()
    seen: dict[str, object] = {}
    exec((SOURCES / "zotune" / "__init__.pyi").read_text(), seen)
    assert {name for name in seen if not name.startswith("_")} == set(zotune.__all__)
    for name in zotune.__all__:
        assert seen[name] is getattr(zotune, name), name
