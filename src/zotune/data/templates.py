"""Templates: text with the fields of a row in braces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from zotune.errors import DataError, unknown

Record = Mapping[str, Any]
"""A row as it is read: values by field name."""


@dataclass(frozen=True)
class Template:
    """A parsed template, such as ``{premise} Is it true that {hypothesis}?``; ``{{`` and ``}}`` are literal braces.

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
    """The value of a field of a row.

    Args:
        record: The row.
        field: The field's name.
        where: Names the row in messages, e.g. ``row 3 of train.jsonl``.
        key: What asks for the field, e.g. ``data.label``.

    Raises:
        DataError: There is no such field, or it holds neither text nor a number.
    """
    if field not in record:
        raise DataError(f"{key}: {where}: {unknown('field', field, (str(name) for name in record))}")
    value = record[field]
    if not isinstance(value, str | int | float):
        got = "nothing" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{key}: {where}: the field {field!r} holds {got}; it must hold text or a number.")
    return value
