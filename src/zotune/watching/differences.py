"""What sets configurations apart, in words short enough for a legend, a table or a folder's name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from zotune.config import Config, tables
from zotune.presets import PRESETS, unused
from zotune.tasks import TASKS

Values = Mapping[str, Any]
"""Values of a configuration by dotted key, e.g. ``method.lr``."""

_LONGEST = 60
"""Characters of a legend; a longer one gives way to the run's name."""


def flatten(table: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables as one, with dotted keys; an empty table says nothing."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        below = {f"{key}.{name}": each for name, each in flatten(value).items()} if isinstance(value, Mapping) else None
        found |= {key: value} if below is None else below
    return found


def values(config: Config) -> dict[str, Any]:
    """All values of a configuration but where the run lies."""
    return {key: value for key, value in flatten(config.model_dump()).items() if key != "output"}


def defaults(configuration: Values) -> dict[str, Any]:
    """What each key is where nobody sets it: the default of the key, of the chosen preset and of the chosen task."""
    found = {
        f"{table}.{key}": field.default
        for table, kind in tables().items()
        for key, field in kind.model_fields.items()
        if not field.is_required()
    }
    if preset := PRESETS.get(configuration.get("method.preset", "")):
        brought = asdict(preset.method).items()
        found |= {f"method.{key}": value for key, value in brought if key not in unused(preset)}
    if task := TASKS.get(configuration.get("data.task") or ""):
        found |= {f"data.{key}": value for key, value in task.defaults if value is not None}
    return found


def differing(configurations: Sequence[Values]) -> list[str]:
    """The keys, in order, whose values are not the same everywhere; a missing key counts as None.

    What differs only because each configuration keeps to its own preset or task is left out.
    """
    keys = dict.fromkeys(key for each in configurations for key in each)
    usual = [defaults(each) for each in configurations]
    return [
        key
        for key in keys
        if len({_canonical(each.get(key)) for each in configurations}) > 1
        and not all(
            key in known and _canonical(each.get(key)) == _canonical(known[key])
            for each, known in zip(configurations, usual, strict=True)
        )
    ]


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Each key's last part, or the whole key where the last part is not clear among these keys."""
    keys = list(keys)
    counts = Counter(key.rpartition(".")[2] for key in keys)
    return {key: last if counts[last := key.rpartition(".")[2]] == 1 else key for key in keys}


def shown(value: Any) -> str:
    """A value as people write it: numbers short, of a path its last part."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and value.startswith(("/", "~", "./", "../")):
        return PurePath(value).name
    return ", ".join(map(shown, value)) if isinstance(value, list | tuple) else str(value)


def shown_apart(values: Sequence[Any]) -> list[str]:
    """Each value as `shown` has it, or whole where another one would look the same, as of two paths that end alike."""
    told = [shown(value) for value in values]
    meant = {
        text: {_canonical(value) for value, same in zip(values, told, strict=True) if same == text} for text in told
    }
    return [text if len(meant[text]) == 1 else str(value) for value, text in zip(values, told, strict=True)]


def labels(names: Sequence[str], configurations: Sequence[Values]) -> list[str]:
    """One legend per run: what differs between the configurations, or the run's name where that does not tell.

    Args:
        names: The runs' names.
        configurations: Their values.
    """
    keys = differing(configurations)
    short = short_names(keys)
    told = [", ".join(f"{short[key]} {shown(each.get(key))}" for key in keys) for each in configurations]
    counts = Counter(told)
    return [_label(name, text, clear=counts[text] == 1) for name, text in zip(names, told, strict=True)]


def _label(name: str, text: str, *, clear: bool) -> str:
    if not text or len(text) > _LONGEST:
        return name
    return text if clear else f"{name} ({text})"


def _canonical(value: Any) -> str:
    return json.dumps(value, default=str)
