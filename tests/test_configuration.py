"""docs/configuration.md says of every key what its model says; run as a script, this file writes it anew."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from zotune.config import Config, tables

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

INTRO = """\
# Configuration

Every key of a configuration file, by table. Keys without a default may be left out, but for those that are required; in
`[method]` the preset's value counts then. Unknown keys and values that are not allowed are refused before anything is
loaded, with the reason. `zotune run CONFIG --set train.steps=10` replaces a value. This page is made from the
descriptions in [config.py](../src/zotune/config.py) by `tests/test_configuration.py`.
"""

NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def kind(annotation: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(parts[0])
    if origin is Literal:
        return " or ".join(f"`{json.dumps(part)}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(kind(part) for part in parts if part is not type(None))
    if origin is list:
        return "list of texts"
    return "table of texts" if origin is dict else NAMES[annotation]


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if field.default is None else f"`{json.dumps(field.default)}`"


def section(name: str, table: type[BaseModel]) -> str:
    lines = [f"## {f'`[{name}]`' if name else 'Above all tables'}", "", table.__doc__ or "", ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in table.model_fields.items():
        if f"{name}.{key}".lstrip(".") not in tables():
            assert field.description, f"{name}.{key} has no description"
            lines.append(f"| `{key}` | {kind(field.annotation)} | {default(field)} | {field.description} |")
    return "\n".join(lines)


def render() -> str:
    """The page."""
    sections = (section(name, table) for name, table in {"": Config, **tables()}.items())
    return "\n\n".join([INTRO.rstrip(), *sections]) + "\n"


def test_the_page_says_what_the_models_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "python tests/test_configuration.py writes it anew"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
