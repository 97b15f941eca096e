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
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zotune.config import Config, dump, load
from zotune.errors import JournalError, RunExistsError
from zotune.evaluate import Metrics

_PACKAGES = ("zotune", "torch", "transformers", "safetensors", "tokenizers", "numpy")


class RunDirectory:
    """The paths of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.journal = path / "journal.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, config: Config) -> RunDirectory:
        """Make the directory with its configuration and manifest.

        Raises:
            RunExistsError: It exists.
        """
        run = cls(Path(config.output))
        run.refuse_existing()
        run.path.mkdir(parents=True)
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

    def add_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

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
                    found[record["step"]] = Metrics(record["loss"], record["accuracy"], record["examples"])
        return found


def manifest() -> dict[str, Any]:
    """Versions, hardware and command line of this process."""
    import torch

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: installed(package) for package in _PACKAGES},
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
