"""The snippets of docs/extending.md do what the page says."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from zotune.config import DataConfig
from zotune.data.sources import Hub, locate
from zotune.estimators import TwoPoint
from zotune.optimizer import Optimizer
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


def test_the_estimator_clips_the_two_point_estimate(snippets: dict[str, Any]) -> None:
    losses, clipped = [0.5, 0.4, 3.0, 1.0], snippets["ClippedTwoPoint"]()
    assert clipped.coefficients(losses, 1e-3)[0] == TwoPoint().coefficients(losses, 1e-3)[0]
    assert clipped.coefficients(losses, 1e-3)[1] == 50


def test_the_task_completes_a_configuration(snippets: dict[str, Any]) -> None:
    completed = snippets["RTE"].complete(DataConfig(train_size=64))
    assert (completed.train_size, completed.candidates) == (64, ["Yes", "No"])
    assert locate(str(completed.train), "train") == Hub("nyu-mll/glue", "rte", "train")


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_the_runtime_conforms(snippets: dict[str, Any], check: Any) -> None:
    marks = snippets["test_two_replicas"].pytestmark
    assert check in itertools.chain.from_iterable(mark.args[1] for mark in marks)
    snippets["test_two_replicas"](check)
