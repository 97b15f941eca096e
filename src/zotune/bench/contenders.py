"""What ``zotune bench convergence`` compares, and the configuration that each of it trains with."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune import config as configuration
from zotune import tasks
from zotune.bench.procedures import PROCEDURES
from zotune.bench.results import Case
from zotune.bench.steps import split_file
from zotune.config import Config, MethodConfig
from zotune.errors import ConfigError, unknown
from zotune.presets import PRESETS
from zotune.run import resolved

TRAINING = ("steps", "batch_size", "eval_every")
"""Keys of the table ``[train]`` that a contender may set: a step of several directions buys fewer steps."""


@dataclass(frozen=True)
class Contender:
    """A preset or another procedure, with settings of its own.

    Attributes:
        name: Of `zotune.presets.PRESETS` or `zotune.bench.procedures.PROCEDURES`.
        settings: Assignments such as ``lr=3e-5``, keys as in the tables ``[method]`` and ``[train]``.
    """

    name: str
    settings: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: str) -> Contender:
        """What ``NAME,KEY=VALUE,...`` says.

        Raises:
            ConfigError: The name is unknown, or a key has no meaning for it.
        """
        name, *settings = (part.strip() for part in text.split(","))
        if name not in PRESETS and name not in PROCEDURES:
            raise ConfigError(unknown("method", name, [*PRESETS, *PROCEDURES]))
        of_method = PROCEDURES[name].settings if name in PROCEDURES else set(MethodConfig.model_fields) - {"preset"}
        for key in (setting.partition("=")[0].strip() for setting in settings):
            if key not in (*of_method, *TRAINING):
                raise ConfigError(unknown(f"setting of {name}", key, (*of_method, *TRAINING)))
        return cls(name, tuple(settings))

    @property
    def label(self) -> str:
        """Name and settings, for people."""
        return ", ".join([self.name, *(setting.replace("=", " ") for setting in self.settings)])

    def configure(self, base: Mapping[str, Any]) -> Config:
        """The configuration of a run like ``base``, given as tables, with this method.

        Raises:
            ConfigError: A value is not allowed.
        """
        table = copy.deepcopy(dict(base))
        preset = PROCEDURES[self.name].preset if self.name in PROCEDURES else self.name
        configuration.assign(table, "method.preset", preset)
        if self.name in PROCEDURES:
            # Only a preset chooses one by itself.
            configuration.assign(table, "method.lr", PROCEDURES[self.name].lr)
        for setting in self.settings:
            section = "train" if setting.partition("=")[0].strip() in TRAINING else "method"
            configuration.override(table, f"{section}.{setting}")
        return resolved(configuration.parse(table, source=self.label))


@dataclass(frozen=True)
class Entry:
    """One training to measure.

    Attributes:
        contender: What trains.
        config: With what; its output is the run directory of a preset.
        case: The settings that the outcome depends on, without this machine's folders.
    """

    contender: Contender
    config: Config
    case: Case


def enter(contender: Contender, base: Mapping[str, Any], task: str, seed: int, data: Path | None, runs: Path) -> Entry:
    """Put a method, a task and a seed together.

    Args:
        contender: The method.
        base: Tables of the configuration that all have in common.
        task: A built-in task.
        seed: Of directions and batch order.
        data: Folder with a folder of rows per task; None: as the task says.
        runs: Folder of run directories.

    Raises:
        ConfigError: Task or settings are not allowed.
        DataError: The rows are not there.
    """
    rows: dict[str, Any] = {"task": tasks.get(task).name}
    if data is not None:
        rows |= {split: str(split_file(data / task, split)) for split in ("train", "validation")}
    tables = {**base, "output": "-", "data": {**base.get("data", {}), **rows}, "train": {**base["train"], "seed": seed}}
    config = contender.configure(tables)
    case = {"method": contender.label, "task": task, "seed": seed, "config": _portable(config)}
    checksum = hashlib.sha256(json.dumps(case, sort_keys=True).encode()).hexdigest()[:8]
    output = runs / f"{contender.name}-{task}-seed{seed}-{checksum}"
    return Entry(contender, config.model_copy(update={"output": str(output)}), case)


def _portable(config: Config) -> dict[str, Any]:
    """All that a training depends on, with names in the place of this machine's folders."""
    tables = config.model_dump(exclude_none=True, exclude={"output", "track"})
    tables["model"]["path"] = _name(config.model.path)
    for split in ("train", "validation"):
        tables["data"][split] = _name(tables["data"][split])
    return tables


def _name(source: str) -> str:
    """A file's or folder's last part; a hub id as it is."""
    return Path(source).name if Path(source).exists() else source
