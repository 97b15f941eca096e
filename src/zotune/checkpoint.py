"""Checkpoints: a runtime's state at a step, written whole or not at all, and verified when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zotune.errors import JournalError

_TENSORS = "state.safetensors"
_ABOUT = "checkpoint.json"


def save(folder: Path, state: Mapping[str, Tensor], *, step: int, window: int, keep: int) -> Path:
    """Write the state after ``step`` finished steps as ``folder/step-N``, then drop all but the newest ``keep``.

    Raises:
        JournalError: It cannot be written; the checkpoints that there were are as before.
    """
    target, draft = folder / f"step-{step:08d}", folder / f".step-{step:08d}.part"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        save_file(dict(state), draft / _TENSORS)
        about = {"step": step, "window": window, "sha256": _sha256(draft / _TENSORS, step, window)}
        (draft / _ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        for name in (_TENSORS, _ABOUT, "."):
            _sync(draft / name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise JournalError(f"cannot write the checkpoint {target}: {error}") from error
    if target.exists():
        shutil.rmtree(target)
    os.replace(draft, target)
    _sync(folder)
    for old in _newest_first(folder)[keep:]:
        shutil.rmtree(old)
    return target


def newest(folder: Path) -> tuple[int, int, dict[str, Tensor]] | None:
    """Step, window and state of the newest checkpoint that verifies; None if there is none at all.

    Raises:
        JournalError: There are checkpoints, but every one is damaged.
    """
    found = _newest_first(folder)
    for path in found:
        try:
            about = json.loads((path / _ABOUT).read_text())
            if about["sha256"] == _sha256(path / _TENSORS, about["step"], about["window"]):
                return about["step"], about["window"], load_file(path / _TENSORS)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if found:
        raise JournalError(
            f"all {len(found)} checkpoints in {folder} are damaged; remove the folder, and the journal rebuilds the run"
        )
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _sha256(tensors: Path, step: int, window: int) -> str:
    """Digest of the tensors' file and of where they belong, so that damage to either shows."""
    with tensors.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(f"{step}/{window}".encode())
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
