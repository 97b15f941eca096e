"""Problems with a configuration: what pydantic says of one, in a line that says what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from zotune.errors import unknown

Tables = Mapping[str, type[BaseModel]]

_UNIONS = {
    "data.bos": "must be 'tokenizer', 'none' or a token id",
    "method.lr": "must be 'auto' or a number from 0 to 1e38",
}
"""What a key of several types allows, in one line: each member of the union complains on its own."""

_TYPES = {
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "list_type": "must be a list",
    "dict_type": "must be a table",
}
"""What pydantic calls a value of another type, and what is allowed."""


def explain(problem: Any, whole: type[BaseModel], tables: Tables) -> str:
    """One line for a problem, with the nearest valid key for an unknown one.

    Args:
        problem: Of pydantic's ``ValidationError.errors()``.
        whole: The model of the whole file.
        tables: Those of its tables by dotted name, each before those in it.
    """
    if not problem["loc"]:
        return f"must be a table of keys, as output and model are, and not {problem['input']!r}"
    path = _key(problem["loc"], tables)
    where = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return _unknown_key(path, whole, tables)
    if problem["type"] == "missing":
        return f"{where} is required"
    if problem["type"] == "model_type":
        return f"{where} is a table: write [{where}] and its keys below (got {problem['input']!r})"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    if where in _UNIONS:
        return f"{where}: {_UNIONS[where]} (got {problem['input']!r})"
    where = ".".join(map(str, problem["loc"]))
    allowed = _TYPES.get(problem["type"], problem["msg"])
    if problem["type"] in ("bool_type", "int_type", "float_type") and isinstance(problem["input"], str):
        # What a file has in quotes, and what is no TOML after --set, such as True or .5.
        allowed += ", in TOML's notation and without quotes"
    return f"{where}: {allowed} (got {problem['input']!r})"


def _key(location: Sequence[int | str], tables: Tables) -> list[str]:
    """The key that a problem is about, and the tables that it is in.

    Below the key pydantic adds members of unions, places in lists and keys of dictionaries, which are left out.
    """
    path = [str(part) for part in location]
    depth = 1
    while depth < len(path) and ".".join(path[:depth]) in tables:
        depth += 1
    return path[:depth]


def _unknown_key(path: list[str], whole: type[BaseModel], tables: Tables) -> str:
    *above, key = path
    where = ".".join(path)
    # A key may be in several tables; the likeliest is one within the table that it was looked for in.
    for name, other in sorted(tables.items(), key=lambda item: not item[0].startswith(".".join([*above, ""]))):
        if key in other.model_fields:
            return f"unknown key {where!r}. Did you mean {name + '.' + key!r}, in the table [{name}]?"
    table = tables[".".join(above)] if above else whole
    return unknown("key", where, [".".join([*above, name]) for name in table.model_fields])
