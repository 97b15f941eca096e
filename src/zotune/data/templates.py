"""Templates: text with the fields of a row in braces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from zotune.data.files import Unheld
from zotune.errors import DataError, unknown

Record = Mapping[str, Any]
"""A row as it is read: values by field name."""


@dataclass(frozen=True)
class Template:
    """A parsed template, such as ``{premise} Is it true that {hypothesis}?``; ``{{`` and ``}}`` are literal braces.

    Dots lead into nested fields, as in ``{answers.text.0}``; a field whose own name has the dots comes first.

    Attributes:
        key: Where the template stands, for messages, e.g. ``data.prompt``.
        text: As it was written.
        parts: Literal texts, each with the field that follows it, or None.
    """

    key: str
    text: str
    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, key: str, text: str) -> Template:
        """Parse ``text``.

        Raises:
            DataError: Braces do not match, or hold anything but a field's name.
        """
        help_text = "Write a field as {name} and a literal brace as {{ or }}."
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise DataError(f"{key}: cannot read the template {text!r}: {error}. {help_text}") from error
        for _, field, form, conversion in parts:
            if field == "" or form or conversion:
                raise DataError(
                    f"{key}: the template {text!r} has braces around something else than a name. {help_text}"
                )
        return cls(key, text, tuple((literal, field) for literal, field, _, _ in parts))

    @property
    def fields(self) -> frozenset[str]:
        """The fields that it needs."""
        return frozenset(field for _, field in self.parts if field is not None)

    def render(self, record: Record, where: str) -> str:
        """The text for one row.

        Raises:
            DataError: The row lacks a field, or has no text or number in it; ``where`` names the row.
        """
        return "".join(
            literal if field is None else literal + str(lookup(record, field, where, self.key))
            for literal, field in self.parts
        )


def lookup(record: Record, field: str, where: str, key: str) -> str | int | float:
    """The text or number in a field of a row.

    Args:
        record: The row.
        field: The field's name, with dots between the names and numbers of nested ones.
        where: Names the row in messages, e.g. ``row 3 of train.jsonl``.
        key: What asks for the field, e.g. ``data.label``.

    Raises:
        DataError: There is no such field, or it holds neither text nor a finite number.
    """
    return _plain(value(record, field, where, key), field, where, key)


def texts(record: Record, field: str, where: str, key: str) -> tuple[str, ...]:
    """The texts in a field that holds one or a list of them, without repetitions; other arguments as for `lookup`.

    Raises:
        DataError: There is no such field, or it holds something else, or an empty list.
    """
    found = value(record, field, where, key)
    if not isinstance(found, list | tuple):
        return (str(_plain(found, field, where, key)),)
    if not found:
        raise DataError(f"{key}: {where}: the field {field!r} holds an empty list; it must hold at least one text.")
    return tuple(dict.fromkeys(str(_plain(each, f"{field}.{i}", where, key)) for i, each in enumerate(found)))


def value(record: Record, field: str, where: str, key: str) -> Any:
    """Whatever is in a field of a row; arguments as for `lookup`.

    Raises:
        DataError: There is no such field.
    """
    if field in record:
        return record[field]
    found: Any = record
    for depth, name in enumerate(names := field.split(".")):
        if isinstance(found, Mapping) and name in found:
            found = found[name]
        elif isinstance(found, list | tuple) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif depth == 0:
            raise DataError(f"{key}: {where}: {unknown('field', field, (str(each) for each in record))}")
        else:
            raise DataError(f"{key}: {where}: the field {'.'.join(names[:depth])!r} has no {name!r} in it.")
    return found


def _plain(found: Any, field: str, where: str, key: str) -> str | int | float:
    """What was found in a field, if it is text or a finite number; a `DataError` otherwise."""
    if not isinstance(found, str | int | float) or (isinstance(found, float) and not math.isfinite(found)):
        raise DataError(f"{key}: {where}: the field {field!r} holds {named(found)}; it must hold text or a number.")
    if isinstance(found, str):
        require_characters(found, f"{key}: {where}: the field {field!r}")
    return found


def named(found: Any) -> str:
    """What a value is, for messages."""
    if isinstance(found, float):
        return str(found)
    if isinstance(found, Unheld):
        return f"what Python cannot hold ({found.why})"
    return "nothing" if found is None else f"a {type(found).__name__}"


def require_characters(text: str, what: str) -> None:
    """Refuse text that no encoding can hold.

    Raises:
        DataError: It has half of a surrogate pair, as JSON's ``\\ud83d`` alone gives.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds {text[error.start]!a} at character {error.start}, half of a surrogate pair, which is no "
            "character. Repair the text where it was cut."
        ) from error
