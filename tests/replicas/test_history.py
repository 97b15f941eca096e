"""What a new replica starts from; no replica is needed for that."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from zotune import checkpoint
from zotune.journal import Entry, Header, Journal
from zotune.optimizer import Method, Optimizer
from zotune.runtimes.replicas.history import History


def taken(run: Path, seed: int) -> History:
    """Six steps of a run with a checkpoint after the third, and what its replicas follow from."""
    run.mkdir()
    optimizer, history = Optimizer(Method(), 6), History(run)
    journal = Journal.create(run / "journal.jsonl", Header(seed, asdict(Method()), 6, 4, "m", "l", "d", "master"))
    for step in range(6):
        journal.append(Entry(step, (0.5,), (1.5,), 1e-6, 7))
        history.append(optimizer.update(step, (1.5,), 1e-6))
        if step == 2:
            state, own = {"w": torch.full((2,), float(seed))}, journal.identity(3)
            checkpoint.save(run / "checkpoints", state, step=3, window=0, keep=1, journal=own)
    journal.close()
    return history


def test_a_checkpoint_spares_a_new_replica_the_steps_before_it_unless_it_is_of_another_run(tmp_path: Path) -> None:
    history = taken(tmp_path / "run", 3)
    found = history.foundation()
    assert found.state is not None
    assert (found.count, found.state["w"].tolist()) == (3, [3.0, 3.0])
    taken(tmp_path / "other", 4)
    folder = tmp_path / "run" / "checkpoints"
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "other" / "checkpoints", folder)
    assert (history.foundation().count, history.foundation().state) == (0, None)
