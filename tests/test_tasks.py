import pytest

from zotune.config import DataConfig
from zotune.data.forms import Classification, form
from zotune.data.sources import Hub, locate
from zotune.data.templates import Template
from zotune.tasks import TASKS


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_complete_by_itself(name):
    task = TASKS[name]
    assert task.name == name
    assert task.summary
    assert task.citation
    config = task.complete(DataConfig(task=name))
    form(config)
    assert isinstance(locate(config.train, "train"), Hub)
    assert locate(config.train, "train") != locate(config.validation, "validation")


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("keys", [{}, {"train": "a.jsonl"}, {"train": "a.jsonl", "validation": "b.jsonl"}])
def test_completing_twice_changes_nothing(name, keys):
    task = TASKS[name]
    once = task.complete(DataConfig(task=name, **keys))
    assert task.complete(once) == once
    assert task.complete(DataConfig.model_validate(once.model_dump(exclude_none=True))) == once


def test_sst2_is_that_of_mezo():
    config = TASKS["sst2"].complete(DataConfig(task="sst2"))
    problem = form(config)
    assert isinstance(problem, Classification)
    row = TASKS["sst2"].prepare({"sentence": "a gorgeous film ", "label": 1, "idx": 3})
    assert problem.prompt.render(row, "row 1") == "a gorgeous film It was"
    assert [candidate.text for candidate in problem.candidates] == [" terrible", " great"]
    assert (config.train_size, config.validation_size) == (1000, 872)
    assert (config.train, config.validation) == ("stanfordnlp/sst2:train", "stanfordnlp/sst2:validation")


def test_explicit_keys_win():
    given = DataConfig(
        task="sst2", train="a.jsonl", validation="b.jsonl", prompt="{text}?", candidates=[" no", " yes"], train_size=7
    )
    config = TASKS["sst2"].complete(given)
    expected = given.model_copy(update={"label": "label", "validation_size": 872})
    assert config == expected


def test_own_training_rows_are_not_paired_with_the_official_validation_rows():
    config = TASKS["sst2"].complete(DataConfig(task="sst2", train="a.jsonl"))
    assert config.validation is None
    assert config.validation_size is None
    assert TASKS["sst2"].complete(DataConfig(task="sst2", validation="b.jsonl")).train == "stanfordnlp/sst2:train"


def test_templates_of_tasks_name_their_fields():
    assert Template.parse("data.prompt", TASKS["sst2"].defaults.prompt or "").fields == {"sentence"}
