"""Runs of a second: a configuration for the tiny model, a reporter that stops, and what a run left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zotune import checkpoint, config
from zotune.config import Config
from zotune.reporters import Record, SilentReporter
from zotune.run import RunDirectory
from zotune.session import restore


@dataclass
class Recorder(SilentReporter):
    """Keeps what it is told, and stops like Ctrl-C once ``stop_after`` steps are finished."""

    stop_after: int | None = None
    steps: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def step(self, record: Record) -> None:
        self.steps.append(record)
        if record["step"] == self.stop_after:
            raise KeyboardInterrupt

    def evaluation(self, record: Record) -> None:
        self.evaluations.append(record)

    def notice(self, text: str) -> None:
        self.notices.append(text)


def configure(
    folder: Path, checkpoint_folder: Path, files: tuple[Path, Path], **tables: dict[str, Any] | str
) -> Config:
    """A configuration whose rows end in the word that decides; ``tables`` replace single keys of it.

    Args:
        folder: Where the run directory ``run`` and the rows go.
        checkpoint_folder: The model.
        files: Rows to train on and to evaluate on, each text with a full stop at its end.
        tables: Tables by name, or ``output`` as the run directory's name within the folder.
    """
    output = tables.pop("output", "run")
    values: dict[str, dict[str, Any]] = {
        "model": {"path": str(checkpoint_folder), "dtype": "float32", "device": "cpu"},
        "data": {
            "train": str(_without_full_stops(files[0], folder)),
            "validation": str(_without_full_stops(files[1], folder)),
            "prompt": "{text}",
            "candidates": [" terrible", " great"],
            "label": "label",
        },
        "method": {"lr": 1e-3},
        "train": {"steps": 30, "batch_size": 4, "eval_every": 1000, "checkpoint_every": 1000},
        "runtime": {"threads": 1},
        "track": {"tensorboard": False},
    }
    for name, table in tables.items():
        assert isinstance(table, dict)
        values[name] = values.get(name, {}) | table
    return config.parse({"output": str(folder / str(output)), **values})


def _without_full_stops(source: Path, folder: Path) -> Path:
    path = folder / source.name
    if not path.exists():
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        path.write_text("".join(json.dumps(row | {"text": row["text"].removesuffix(" .")}) + "\n" for row in rows))
    return path


def saved(run: Path) -> dict[str, Tensor]:
    """The newest checkpoint's tensors, in memory of their own: those that were read may be a view of the file."""
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None
    return {name: tensor.clone() for name, tensor in found[2].items()}


def restored(run: Path) -> dict[str, Tensor]:
    """The state that a run would go on from."""
    session, _ = restore(*RunDirectory.open(run))
    return session.runtime.state()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name


def contents(run: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
