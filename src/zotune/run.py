"""A run on disk: a directory of plain files.

config.toml      the resolved configuration
manifest.json    versions, hardware and command line
journal.jsonl    one record per step; with the base model it is the fine-tune
metrics.jsonl    what people and plots read: steps and evaluations
checkpoints/     states to resume from without replaying everything
curves.png       loss and accuracy
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zotune import tasks
from zotune.config import Config, MethodConfig, dump, load
from zotune.errors import ConfigError, JournalError, RunExistsError
from zotune.evaluate import Metrics
from zotune.presets import resolve

_PACKAGES = ("zotune", "torch", "transformers", "safetensors", "tokenizers", "numpy")


class RunDirectory:
    """The paths of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path = path.expanduser()
        self.config = path / "config.toml"
        self.journal = path / "journal.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, config: Config) -> RunDirectory:
        """Make the directory with its configuration and manifest.

        Raises:
            RunExistsError: It exists.
            ConfigError: It cannot be made.
        """
        run = cls(Path(config.output))
        run.refuse_existing()
        try:
            run.path.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"output: cannot make the run directory {run.path}: {error.strerror}") from error
        run.write_config(config)
        (run.path / "manifest.json").write_text(json.dumps(manifest(), indent=2) + "\n")
        return run

    def refuse_existing(self) -> None:
        """Raise `RunExistsError` if something is there already; nothing is touched."""
        if self.path.exists():
            raise RunExistsError(
                f"{self.path} exists. Continue it with 'zotune resume {self.path}', or set another output directory."
            )

    @classmethod
    def open(cls, path: Path) -> tuple[RunDirectory, Config]:
        """An existing run and its configuration.

        Raises:
            JournalError: The path is no run.
        """
        run = cls(path)
        if not run.config.is_file() or not run.journal.is_file():
            raise JournalError(f"{path} is not a run directory: it has no config.toml and journal.jsonl")
        return run, load(run.config)

    def write_config(self, config: Config) -> None:
        """Replace the configuration, whole or not at all."""
        draft = self.config.with_suffix(".part")
        draft.write_text(dump(config), encoding="utf-8")
        os.replace(draft, self.config)

    def reopen(self, config: Config) -> None:
        """Make ready for more steps: another configuration, and metrics without the torn line of a killed process."""
        self.write_config(config)
        if self.metrics.is_file():
            os.truncate(self.metrics, self.metrics.read_bytes().rfind(b"\n") + 1)

    def add_metrics(self, record: dict[str, Any]) -> dict[str, Any]:
        """Append one line to the metrics and return it as written, with null for what is not finite."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean, allow_nan=False) + "\n")
        return clean

    def evaluations(self) -> dict[int, Metrics]:
        """The evaluations recorded so far, by finished steps."""
        found = {}
        if self.metrics.is_file():
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if record["kind"] == "eval":
                    loss = math.nan if record["loss"] is None else record["loss"]
                    found[record["step"]] = Metrics(loss, record["accuracy"], record["examples"])
        return found


def manifest() -> dict[str, Any]:
    """Versions, hardware and command line of this process."""
    import torch

    return {
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "versions": versions(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that a result depends on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def resolved(config: Config) -> Config:
    """The configuration with the values of its preset and its task written out, and paths that hold from anywhere."""
    method = resolve(config.method)
    values = {name: getattr(method, name) for name in MethodConfig.model_fields if name != "preset"}
    data = config.data if config.data.task is None else tasks.get(config.data.task).complete(config.data)
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": _absolute(config.model.path)}),
            "data": data.model_copy(update={"train": _absolute(data.train), "validation": _absolute(data.validation)}),
            "method": config.method.model_copy(update=values),
        }
    )


def _absolute(source: str | None) -> str | None:
    """A path that exists as an absolute one; a hub id as it is."""
    if source is None or not Path(source).expanduser().exists():
        return source
    return str(Path(source).expanduser().resolve())
