"""The plan of a sweep: one configuration per run, all of them checked before the first one starts."""

from __future__ import annotations

import copy
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune import config as configuration
from zotune.config import Config
from zotune.errors import ConfigError, unknown
from zotune.paths import StrPath, expand
from zotune.run import resolved
from zotune.watching.differences import differing, flatten, short_names, shown

KEYS = ("output", "base", "grid", "run")
_LONGEST_NAME = 100

PLANNED = "zotune.read_sweep(path) reads one"
"""How to come by a `Plan`."""

Point = dict[str, Any]
"""What one run sets, by dotted key."""


@dataclass(frozen=True)
class Planned:
    """A run of a sweep.

    Attributes:
        name: Of its directory within the sweep's folder.
        point: What it sets over the base configuration.
        config: All of its configuration, resolved.
    """

    name: str
    point: Point
    config: Config

    @property
    def path(self) -> Path:
        """The run directory."""
        return expand(self.config.output)


@dataclass(frozen=True)
class Plan:
    """A sweep.

    Attributes:
        source: The file that it was read from.
        folder: Where its runs and its summary are.
        keys: What varies, as dotted keys; a key that every run sets to the same value does not.
        runs: In the order in which they are done.
    """

    source: Path
    folder: Path
    keys: tuple[str, ...]
    runs: tuple[Planned, ...]


def read(path: StrPath) -> Plan:
    """Read and check a sweep file; nothing is loaded or written.

    ``output`` is the folder of the sweep. ``base`` is a configuration: a file's path, or its tables in place.
    ``[grid]`` has a list of values per key, of which every combination is run. Each ``[[run]]`` is one run's keys; with
    a grid as well, each of them is combined with all of it. Keys are written ``"method.lr"`` or ``method.lr``.

    Raises:
        ConfigError: The file is missing or is no sweep, a run's configuration is not allowed, or two runs are the same.
    """
    path = expand(path)
    table = configuration.read(path)
    for key in table:
        if key not in KEYS:
            raise ConfigError(f"{path}: {unknown('key', key, KEYS)}")
    output, base = table.get("output"), table.get("base")
    if not isinstance(output, str) or not output:
        raise ConfigError(f"{path}: output is required: the folder for the runs of this sweep (got {output!r})")
    if not isinstance(base, str | dict):
        raise ConfigError(
            f"{path}: base is required: the path of a configuration, or its tables as [base.model], [base.data], ... "
            f"(got {base!r})"
        )
    tables = configuration.read(base) if isinstance(base, str) else base
    points = _points(path, table.get("grid", {}), table.get("run", []))
    folder = expand(output)
    runs = tuple(
        Planned(name, point, _configure(path, folder / name, tables, point))
        for name, point in zip(names(points), points, strict=True)
    )
    _require_distinct(path, runs)
    return Plan(path, folder, tuple(differing(points)), runs)


def names(points: Sequence[Point]) -> list[str]:
    """A readable folder name for each of some different points, e.g. ``lr=1e-05,seed=0``; ``base`` where none is set.

    Names that would be the same, or too long, end in a checksum of the point. A name does not depend on the order.
    """
    short = short_names(dict.fromkeys(key for point in points for key in point))
    told = [",".join(f"{short[key]}={_word(value)}" for key, value in point.items()) or "base" for point in points]
    # Some file systems take upper and lower case for the same.
    counts = Counter(name.casefold() for name in told)
    return [
        name if counts[name.casefold()] == 1 and len(name) <= _LONGEST_NAME else f"{name[:80]}-{_checksum(point)}"
        for name, point in zip(told, points, strict=True)
    ]


def _points(path: Path, grid: Any, runs: Any) -> list[Point]:
    """What each run sets: every combination of the grid's values, for each of the listed runs."""
    if not isinstance(grid, dict) or not isinstance(runs, list) or not all(isinstance(each, dict) for each in runs):
        raise ConfigError(f"{path}: grid is a table, [grid], and runs are listed as [[run]]")
    columns, listed = flatten(grid), [flatten(each) for each in runs]
    if not columns and not listed:
        raise ConfigError(
            f"{path}: nothing varies. Add [grid] with lists, e.g. train.seed = [0, 1, 2], or [[run]] tables"
        )
    for key, values in columns.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: grid.{key} must be a list of values with one at least (got {values!r})")
    # A table among the values sets each of its keys, as it does in a listed run.
    options = [[flatten({key: value}) for value in values] for key, values in columns.items()]
    places = Counter(key for points in (*options, listed) for key in dict.fromkeys(itertools.chain(*points)))
    for key, count in places.items():
        if key == "output":
            raise ConfigError(f"{path}: output cannot vary: the sweep names the directories of its runs")
        if count > 1:
            raise ConfigError(f"{path}: {key} is set in [grid] and in [[run]], or twice in [grid]; leave one out")
    combinations = [dict(item for part in parts for item in part.items()) for parts in itertools.product(*options)]
    return [each | combination for each in listed or [{}] for combination in combinations]


def _configure(path: Path, output: Path, tables: Mapping[str, Any], point: Point) -> Config:
    table = copy.deepcopy(dict(tables))
    for key, value in point.items():
        configuration.assign(table, key, value)
    table["output"] = str(output)
    return resolved(configuration.parse(table, source=f"{path}, run {output.name}"))


def _require_distinct(path: Path, runs: Sequence[Planned]) -> None:
    seen: dict[str, str] = {}
    for each in runs:
        told = configuration.dump(each.config.model_copy(update={"output": "-"}))
        if told in seen:
            raise ConfigError(f"{path}: {seen[told]} and {each.name} are the same run; leave one of them out")
        seen[told] = each.name


def _word(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", shown(value)).strip("-") or "empty"


def _checksum(point: Point) -> str:
    return f"{zlib.crc32(json.dumps(point, sort_keys=True, default=str).encode()):08x}"
