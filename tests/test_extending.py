"""The snippets of docs/extending.md do what the page says."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

import zotune
from zotune.config import DataConfig
from zotune.data.sources import Hub, locate
from zotune.estimators import ESTIMATORS
from zotune.optimizer import Method, Optimizer
from zotune.protocol import CLEAN
from zotune.testing import conformance

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def snippets() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "extending"}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_the_preset_asks_for_a_clean_probe_and_four_directions(snippets: dict[str, Any]) -> None:
    probes = Optimizer(snippets["LOZO_SIGNS"].method, steps=10).ask(0).probes
    assert probes[0] == CLEAN
    assert len({probe.key for probe in probes[1:]}) == 4


def test_a_run_with_the_estimator_has_clipped_coefficients(
    snippets: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ESTIMATORS, "clipped", snippets["ClippedTwoPoint"]())
    optimizer = Optimizer(Method(estimator="clipped", directions=2, eps=1e-3), steps=10)  # type: ignore[arg-type]
    update = optimizer.tell(optimizer.ask(0), [0.5, 0.4, 3.0, 1.0])
    assert [coefficient for _, coefficient in update.terms] == [pytest.approx(25), 50]


def test_the_task_completes_a_configuration(snippets: dict[str, Any]) -> None:
    completed = snippets["QNLI"].complete(DataConfig(train_size=64))
    assert (completed.train_size, completed.candidates) == (64, ["Yes", "No"])
    assert locate(str(completed.train), "train") == Hub("nyu-mll/glue", "qnli", "train")


def test_the_callback_ends_a_run_and_writes_down_how_far_it_came(
    snippets: dict[str, Any], tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]
) -> None:
    method = {"lr": 2e-3, "eps": 1e-2, "directions": 4, "interval": 10}
    train = {"steps": 60, "batch_size": 16, "eval_every": 5}
    chosen = tiny_runs.configure(tmp_path, tiny_model_folder, sentiment_files, method=method, train=train)
    callback = snippets["StopAtTarget"](0.9, tmp_path / "reached.json")
    summary = zotune.start(chosen, zotune.SilentReporter(), callbacks=[callback])
    assert 0 < summary.steps < 60
    assert summary.last.accuracy is not None
    assert summary.last.accuracy >= 0.9
    assert summary.stopped == f"the accuracy is {summary.last.accuracy:.3f}"
    assert json.loads((tmp_path / "reached.json").read_text()) == {"accuracy": summary.last.accuracy}


def test_each_sample_is_short(snippets: dict[str, Any]) -> None:
    samples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert max(len(sample.splitlines()) for sample in samples) < 60


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_the_runtime_conforms(snippets: dict[str, Any], check: Any) -> None:
    marks = snippets["test_two_replicas"].pytestmark
    assert check in itertools.chain.from_iterable(mark.args[1] for mark in marks)
    snippets["test_two_replicas"](check)
