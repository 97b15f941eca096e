"""A run on disk: a directory of plain files.

config.toml      the resolved configuration
manifest.json    versions, hardware and command line
journal.jsonl    one record per step; with the base model it is the fine-tune
metrics.jsonl    what people and plots read: steps and evaluations
predictions.jsonl  what the model answered at each evaluation
checkpoints/     states to resume from without replaying everything, the newest and the best
curves.png       loss and accuracy
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from zotune import machine, tasks
from zotune.config import AUTO, Config, MethodConfig, dump, load
from zotune.durable import draft_of, replace
from zotune.errors import ConfigError, JournalError, RunExistsError
from zotune.evaluate import Evaluation, Metrics
from zotune.figures import as_json, from_json
from zotune.journal import Header, Journal
from zotune.paths import StrPath, expand
from zotune.presets import get, refuse_unused, resolve, unused
from zotune.watching import metrics


class RunDirectory:
    """The paths of a run."""

    def __init__(self, path: StrPath) -> None:
        self.path = path = expand(path)
        self.config = path / "config.toml"
        self.manifest = path / "manifest.json"
        self.journal = path / "journal.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.predictions = path / "predictions.jsonl"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, config: Config, header: Header) -> RunDirectory:
        """Make the directory with its configuration, its manifest and the head of its journal, all at once.

        Raises:
            RunExistsError: It exists.
            ConfigError: It cannot be made.
        """
        run = cls(config.output)
        run.require_free()
        # What is there under the run's name can always be resumed, whenever the process is killed.
        draft = cls(draft_of(run.path))
        try:
            draft.path.mkdir(parents=True)
            draft.write_config(config)
            draft.manifest.write_text(json.dumps(manifest(), indent=2) + "\n")
            Journal.create(draft.journal, header).close()
            draft.path.rename(run.path)
        except OSError as error:
            shutil.rmtree(draft.path, ignore_errors=True)
            raise ConfigError(f"output: cannot make the run directory {run.path}: {error.strerror}") from error
        return run

    def require_free(self) -> None:
        """Make sure, before anything that takes time, that the directory is not there and can be made.

        Raises:
            RunExistsError: Something is there already; it is left as it is.
            ConfigError: It cannot be made where it is to be.
        """
        if self.journal.exists():
            raise RunExistsError(
                f"{self.path} exists. Continue it with 'zotune resume {self.path}', or set another output directory."
            )
        if os.path.lexists(self.path):
            raise RunExistsError(f"{self.path} exists and is no run. It is left as it is; set another output.")
        above = next(folder for folder in self.path.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            why = os.strerror(errno.EACCES if above.is_dir() else errno.ENOTDIR)
            raise ConfigError(f"output: cannot make the run directory {self.path}: {why} ({above})")

    @classmethod
    def open(cls, path: StrPath) -> tuple[RunDirectory, Config]:
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
        replace(self.config, dump(config).encode())

    def reopen(self, config: Config) -> None:
        """Make ready for more steps: another configuration, and no line that a crash or a bad disk has damaged.

        Raises:
            JournalError: The directory cannot be written to.
        """
        try:
            self.write_config(config)
            _keep_lines(self.metrics, lambda line: metrics.parse(line) is not None)
            _keep_lines(self.predictions, _is_json)
        except OSError as error:
            raise self._cannot_write(self.path, error) from error

    def read_manifest(self) -> dict[str, Any]:
        """What `manifest` said when the run began; nothing where the file is missing or damaged."""
        try:
            found = from_json(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def add_metrics(self, record: dict[str, Any]) -> dict[str, Any]:
        """Append one line to the metrics and return it as written, with null for what is not finite.

        Raises:
            JournalError: It cannot be written, for example because the disk is full.
        """
        clean = as_json(record)
        self._append(self.metrics, clean)
        return clean

    def add_predictions(self, step: int, found: Evaluation, rows: str) -> None:
        """Append what the model answered after so many steps; of two lines for one step the later counts.

        Args:
            step: Finished steps.
            found: The evaluation.
            rows: The checksum of the validation rows.

        Raises:
            JournalError: As for `add_metrics`.
        """
        answers = {"predicted": list(found.predicted), "right": list(found.right)}
        self._append(self.predictions, {"step": step, **answers, "rows": rows})

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise self._cannot_write(path, error) from error

    def _cannot_write(self, path: Path, error: OSError) -> JournalError:
        return JournalError(
            f"cannot write to {path}: {error.strerror}. The journal has every finished step: "
            f"mend that, then go on with 'zotune resume {self.path}'."
        )

    def evaluations(self, upto: int | None = None, rows: str | None = None) -> dict[int, Metrics]:
        """The evaluations recorded so far that can be compared, by finished steps.

        Args:
            upto: Only those after at most so many steps.
            rows: The checksum of the validation rows; default: those of the last of these evaluations.
        """
        found = {}
        for record in metrics.comparable(self._evaluations(upto), rows):
            loss = math.nan if record["loss"] is None else record["loss"]
            shares = [record.get(name) for name in ("exact_match", "f1")]
            found[record["step"]] = Metrics(loss, record.get("accuracy"), record.get("examples", 0), *shares)
        return found

    def evaluated_rows(self, upto: int) -> tuple[str, int] | None:
        """Checksum and number of the validation rows of the last evaluation after at most ``upto`` steps.

        None if there is no evaluation, or if it was recorded by an earlier version, which named no rows.
        """
        last = next(reversed(self._evaluations(upto)), None)
        return (last["rows"], last.get("examples", 0)) if last is not None and "rows" in last else None

    def _evaluations(self, upto: int | None) -> list[dict[str, Any]]:
        return [record for record in self._records("eval") if upto is None or record["step"] <= upto]

    def recorded_steps(self) -> set[int]:
        """The steps that have a line in the metrics, counted from 1."""
        return {record["step"] for record in self._records("step")}

    def _records(self, kind: str) -> Iterator[dict[str, Any]]:
        """The metrics of a kind; a line that is damaged is passed over."""
        if not self.metrics.is_file():
            return
        for line in self.metrics.read_bytes().split(b"\n"):
            if (record := metrics.parse(line)) is not None and record["kind"] == kind:
                yield record


def _keep_lines(path: Path, sound: Callable[[bytes], bool]) -> None:
    """Drop the lines of a file that are not sound; if all are, the file stays as it is."""
    if path.is_file():
        content = path.read_bytes()
        kept = b"".join(line + b"\n" for line in content.split(b"\n") if sound(line))
        if kept != content:
            replace(path, kept)


def _is_json(line: bytes) -> bool:
    try:
        from_json(line)
    except ValueError:
        return False
    return True


def manifest() -> dict[str, Any]:
    """Versions, hardware and command line of this process."""
    return {
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine.describe(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def resolved(config: Config) -> Config:
    """The configuration with the values of its preset and its task written out, and paths that hold from anywhere.

    An automatic learning rate stays one: it is chosen when the run begins.
    """
    refuse_unused(config.method)
    method = resolve(config.method)
    kept = {"preset", *unused(get(config.method.preset))} | ({"lr"} if config.method.lr == AUTO else set())
    values = {name: getattr(method, name) for name in MethodConfig.model_fields if name not in kept}
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
    if source is None or not (path := expand(source)).exists():
        return source
    return str(path.resolve())
