"""Checkpoints: a runtime's state at a step, written whole or not at all, and verified when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from zotune.durable import sync
from zotune.errors import JournalError
from zotune.figures import from_json

Identity = Callable[[int], str | None]
"""What a run's journal says of its first so many steps, as `zotune.journal.Journal.identity`; None if it has fewer."""

_TENSORS = "state.safetensors"
_ABOUT = "checkpoint.json"


def save(
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    step: int,
    window: int,
    keep: int,
    best: int | None = None,
    journal: str | None = None,
) -> Path:
    """Write the state after ``step`` finished steps as ``folder/step-N``, then drop what is not to be kept.

    Args:
        folder: Where checkpoints are; made if it is not there.
        state: What `zotune.runtimes.base.Runtime.state` returned.
        step: Finished steps.
        window: The window of the next step.
        keep: How many to keep, the newest ones.
        best: The step whose checkpoint stays as well, however old it is.
        journal: The identity of the steps that it is the state after, so that it counts in no other run. None: in any.

    Raises:
        JournalError: It cannot be written; the checkpoints that there were are as before.
    """
    target, draft = path_of(folder, step), folder / f".step-{step:08d}.part"
    for left in folder.glob(".step-*.part"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        save_file(dict(state), draft / _TENSORS)
        about: dict[str, Any] = {"step": step, "window": window} | ({"journal": journal} if journal else {})
        about["sha256"] = _sha256(draft / _TENSORS, about)
        (draft / _ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        for name in (_TENSORS, _ABOUT, "."):
            sync(draft / name)
        if target.exists():
            shutil.rmtree(target)
        os.replace(draft, target)
        sync(folder)
        kept = {target} if best is None else {target, path_of(folder, best)}
        for old in _newest_first(folder)[keep:]:
            if old not in kept:
                shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise JournalError(
            f"cannot write the checkpoint {target}: {error}. The journal has every step: free space there and resume."
        ) from error
    return target


def newest(
    folder: Path,
    *,
    upto: int | None = None,
    identity: Identity = lambda step: None,
    notice: Callable[[str], None] = lambda text: None,
    bank: int = 0,
) -> tuple[int, int, dict[str, Tensor]] | None:
    """Step, window and state of the newest sound checkpoint that fits; None if there is none.

    Args:
        folder: Where checkpoints are.
        upto: Leave out those of later steps.
        identity: Of the run's steps; without it, checkpoints of any run count.
        notice: Told of each that is damaged, of another run or of another bank, in one line.
        bank: Columns of the update bank of whose state it is to be (`zotune.config.RuntimeConfig.bank`).
    """
    for path in _newest_first(folder):
        about = _verified(path)
        if (wrong := _fault(about, identity)) is not None:
            notice(f"the checkpoint {path} is {wrong} and not used; an older one or the journal makes up for it")
        elif about is not None and (upto is None or about["step"] <= upto):
            if (banked := _bank(path / _TENSORS)) == bank:
                return about["step"], about["window"], load_file(path / _TENSORS)
            notice(
                f"the checkpoint {path} is of runtime.vllm.bank_rank = {banked}, not {bank}, and not used; the journal "
                "makes up for it"
            )
    return None


def _bank(tensors: Path) -> int:
    """Columns of the update bank that a state has beside its weights, by the file's header; 0 without one."""
    with safe_open(tensors, "pt") as file:
        stacks = [name for name in file.keys() if name.startswith("bank/v/")]  # noqa: SIM118
        return max((file.get_slice(name).get_shape()[1] for name in stacks), default=0)


def sound(folder: Path, step: int, identity: Identity = lambda step: None) -> bool:
    """Whether there is a checkpoint of this step, it verifies, and it is none of another run."""
    return fault(folder, step, identity) is None


def fault(folder: Path, step: int, identity: Identity) -> str | None:
    """Why a step's checkpoint is not sound: it is ``damaged`` or ``of another run``; None if it is sound."""
    return _fault(_verified(path_of(folder, step)), identity)


def _fault(about: Mapping[str, Any] | None, identity: Identity) -> str | None:
    if about is None:
        return "damaged"
    own, its = identity(about["step"]), about.get("journal")
    # Earlier versions wrote no identity, and of steps that the journal does not have there is none.
    return None if own is None or its is None or own == its else "of another run"


def _verified(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself, if its digest confirms it."""
    try:
        about = from_json((path / _ABOUT).read_text())
        return about if about["sha256"] == _sha256(path / _TENSORS, about) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, sound or not, ascending; no name counts but what `save` gives."""
    numbers = {int(n) for n in (path.name.removeprefix("step-") for path in folder.glob("step-*")) if n.isdecimal()}
    return sorted(step for step in numbers if path_of(folder, step).is_dir())


def _newest_first(folder: Path) -> list[Path]:
    return [path_of(folder, step) for step in reversed(steps(folder))]


def _sha256(tensors: Path, about: Mapping[str, Any]) -> str:
    """Digest of the tensors' file and of where they belong, so that damage to either shows."""
    place = f"{about['step']}/{about['window']}"
    if about.get("journal") is not None:
        place += f"/{about['journal']}"
    with tensors.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(place.encode())
    return digest.hexdigest()
