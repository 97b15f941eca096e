"""What a run comes to does not depend on how many replicas there are, however its steps are cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny_runs
from teams import WarmCluster
from tiny_runs import Recorder, assert_same, saved

import zotune
from zotune.config import Config

pytestmark = pytest.mark.usefixtures("ray_cluster")

Configure = Callable[..., Config]


@pytest.fixture
def configure(
    tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Configure:
    monkeypatch.setattr("zotune.runtimes.replicas.runtime.Cluster", WarmCluster)
    return partial(tiny_runs.configure, tmp_path, tiny_model_folder, sentiment_files)


@pytest.mark.parametrize("split", ["auto", "direction", "sign", "rows"])
def test_journals_and_weights_have_the_same_bits_for_any_number(
    configure: Configure, tmp_path: Path, split: str
) -> None:
    """Updates fold twice on the way; evaluations are cut, too."""
    method = {"preset": "lozo-m", "directions": 4, "interval": 3}
    for replicas in (1, 2, 4):
        ray = {"replicas": replicas, "split": split, "unit_tokens": 64}
        chosen = configure(
            output=f"run-{replicas}",
            method=method,
            train={"steps": 8, "eval_every": 4},
            runtime={"type": "ray", "ray": ray},
        )
        zotune.start(chosen, Recorder())
    one = tmp_path / "run-1"
    for other in (tmp_path / "run-2", tmp_path / "run-4"):
        assert (other / "journal.jsonl").read_bytes() == (one / "journal.jsonl").read_bytes()
        assert_same(saved(other), saved(one))
