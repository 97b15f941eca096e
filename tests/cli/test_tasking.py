from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from zotune import cli
from zotune.config import DataConfig
from zotune.tasks import TASKS


def out(*words: str) -> str:
    result = CliRunner().invoke(cli.app, ["tasks", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_list_has_every_task_with_its_rows_and_data_set() -> None:
    lines = {line.split()[0]: line for line in out().splitlines() if line.strip()}
    for name, task in TASKS.items():
        assert f"{task.defaults.train_size} + {task.defaults.validation_size}" in lines[name]
        assert str(task.defaults.train).removesuffix(":train") in lines[name]
        assert task.metric in lines[name]


@pytest.mark.parametrize("name", TASKS)
def test_one_in_full(name: str) -> None:
    shown, task = out(name), TASKS[name]
    for text in (task.summary, task.citation, json.dumps(task.defaults.prompt), *task.deviations):
        assert text in shown


def test_the_defaults_in_json_are_those_of_the_table_data() -> None:
    listed = json.loads(out("--json"))
    assert [task["name"] for task in listed] == list(TASKS)
    assert [DataConfig(**task["defaults"]) for task in listed] == [task.defaults for task in TASKS.values()]
    assert json.loads(out("copa", "--json")) == next(task for task in listed if task["name"] == "copa")


def test_a_task_that_is_not_there() -> None:
    result = CliRunner().invoke(cli.app, ["tasks", "squat"])
    assert result.exit_code == 2
    assert "unknown task 'squat'. Did you mean 'squad'?" in result.output
