from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zotune import config as configuration
from zotune.config import DataConfig
from zotune.data import Dataset, load
from zotune.data.forms import Classification, form
from zotune.data.sources import Hub, locate
from zotune.data.templates import Template
from zotune.errors import DataError
from zotune.objectives import CandidateCrossEntropy, CompletionNLL
from zotune.rows import Example
from zotune.tasks import TASKS

CONTEXT = 20_000


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """A token per byte, so that no space or line break can hide; the last one ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate([*alphabet, "</s>"])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


@dataclass(frozen=True)
class Case:
    """A row in the form of the data set, and what the model must see of it."""

    task: str
    row: dict[str, Any]
    prompt: str
    candidates: tuple[str, ...]
    gold: int = 0
    answers: tuple[str, ...] = ()


CASES = (
    Case(
        "sst2",
        {"sentence": "a gorgeous film ", "label": 1, "idx": 3},
        "a gorgeous film It was",
        (" terrible", " great"),
        gold=1,
    ),
    Case(
        "rte",
        {"premise": "Anna sold her boat.", "hypothesis": "Anna had a boat.", "idx": 0, "label": 0},
        'Anna sold her boat.\nDoes this mean that "Anna had a boat." is true? Yes or No?\n',
        ("Yes", "No"),
    ),
    Case(
        "cb",
        {"premise": "Did he say it rained?", "hypothesis": "it rained", "idx": 0, "label": 2},
        'Suppose Did he say it rained? Can we infer that "it rained"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        gold=2,
    ),
    Case(
        "boolq",
        {"question": "is the kiwi a bird", "passage": "Kiwi -- Kiwi are birds of New Zealand.", "idx": 0, "label": 1},
        "Kiwi -- Kiwi are birds of New Zealand. Is the kiwi a bird?",
        (" No", " Yes"),
        gold=1,
    ),
    Case(
        "wic",
        {
            "word": "bank",
            "sentence1": "The bank was steep.",
            "sentence2": "She went to the bank to pay.",
            "start1": 4,
            "start2": 16,
            "end1": 8,
            "end2": 20,
            "idx": 0,
            "label": 0,
        },
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "The bank was steep.\nShe went to the bank to pay.\n",
        ("No", "Yes"),
    ),
    Case(
        "wsc",
        {
            "text": "Tom rang Ann because He was late.",
            "span1_index": 0,
            "span2_index": 4,
            "span1_text": "Tom",
            "span2_text": "He",
            "idx": 0,
            "label": 1,
        },
        'Tom rang Ann because He was late.\nIn the previous sentence, does the pronoun "he" refer to Tom? Yes or No?\n',
        ("No", "Yes"),
        gold=1,
    ),
    Case(
        "copa",
        {
            "premise": "The lamp went out.",
            "choice1": "The room got dark.",
            "choice2": "I read on.",
            "question": "effect",
            "idx": 0,
            "label": 0,
        },
        "The lamp went out so",
        (" the room got dark.", " I read on."),
    ),
    Case(
        "copa",
        {
            "premise": "The lamp went out. ",
            "choice1": "I'd paid.",
            "choice2": "Power failed.",
            "question": "cause",
            "label": 1,
        },
        "The lamp went out because",
        (" i'd paid.", " power failed."),
        gold=1,
    ),
    Case(
        "multirc",
        {
            "paragraph": "Mia walked home. ",
            "question": "Where did Mia go?",
            "answer": "Home",
            "idx": {"paragraph": 0, "question": 0, "answer": 0},
            "label": 1,
        },
        'Mia walked home. \nQuestion: Where did Mia go?\nI found this answer "Home". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        gold=1,
    ),
    Case(
        "squad",
        {
            "id": "1",
            "title": "Mill_Creek",
            "context": "The mill was built in 1851 by Ole Berg.",
            "question": " Who built the mill? ",
            "answers": {"text": ["Ole Berg", "Berg"], "answer_start": [30, 34]},
        },
        "Title: Mill_Creek\nContext: The mill was built in 1851 by Ole Berg.\nQuestion: Who built the mill?\nAnswer:",
        (" Ole Berg\n",),
        answers=("Ole Berg", "Berg"),
    ),
    Case(
        "drop",
        {
            "query_id": "1",
            "passage": "Three ships left and one came back.",
            "question": "How many ships were lost?",
            "answers_spans": {"spans": ["2"]},
        },
        "Passage: Three ships left and one came back.\nQuestion: How many ships were lost?\nAnswer:",
        (" 2\n",),
        answers=("2",),
    ),
)


def loaded(task: str, rows: list[dict[str, Any]], folder: Path, letters: PreTrainedTokenizerFast) -> Dataset:
    """The rows read through the task from files of JSON lines, as training and as validation rows."""
    paths = folder / "train.jsonl", folder / "validation.jsonl"
    for path in paths:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(DataConfig(task=task, train=str(paths[0]), validation=str(paths[1])), letters, CONTEXT)


def example(case: Case, folder: Path, letters: PreTrainedTokenizerFast) -> tuple[Example, Dataset]:
    """The case's example, and all of its data set; a second row of another label keeps it from being refused."""
    other = case.row | {"label": (case.row["label"] + 1) % 2} if "label" in case.row else case.row
    data = loaded(case.task, [case.row, other], folder, letters)
    (found, *_) = [each for each in data.validation if each.gold == case.gold]
    return found, data


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.task}-{case.gold}")
def test_the_model_sees_the_text_of_the_paper(case: Case, tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    found, data = example(case, tmp_path, letters)
    assert letters.decode(found.row.prompt) == case.prompt
    assert tuple(letters.decode(candidate.tokens) for candidate in found.row.candidates) == case.candidates
    assert all(len(candidate.scored) == len(candidate.tokens) for candidate in found.row.candidates)
    assert (found.gold, found.answers) == (case.gold, case.answers)
    told = found.right_alone() if isinstance(data.objective, CompletionNLL) else found
    assert told in data.train


def test_every_task_has_a_case() -> None:
    assert {case.task for case in CASES} == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_is_that_of_the_protocol(name: str, tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    case = next(case for case in CASES if case.task == name)
    objective = example(case, tmp_path, letters)[1].objective
    gold = name in ("copa", "squad", "drop")
    assert isinstance(objective, CompletionNLL if gold else CandidateCrossEntropy)
    assert TASKS[name].metric == ("f1" if name in ("squad", "drop") else "accuracy")


def test_written_answers_end_with_the_line_or_the_text(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    data = example(next(case for case in CASES if case.task == "squad"), tmp_path, letters)[1]
    assert [letters.decode([token]) for token in data.stop] == ["</s>", "\n"]
    assert data.decode([*letters.encode("a b"), data.stop[0]]) == "a b"


@pytest.mark.parametrize(
    ("question", "expected"),
    [("Is it?", "Is it?"), ("is it", "Is it?"), ("é fine", "É fine?"), ("", "?"), ("iPod or not", "IPod or not?")],
)
def test_boolq_asks_in_a_sentence(question: str, expected: str) -> None:
    assert TASKS["boolq"].prepare({"question": question})["question"] == expected


def test_copa_knows_causes_and_effects_only() -> None:
    with pytest.raises(DataError, match=r"'cause' or 'effect'; one row has 'why'"):
        TASKS["copa"].prepare({"question": "why"})


@pytest.mark.parametrize("name", ["squad", "drop"])
@pytest.mark.parametrize("answers", [["two", "2"], "two", {"text": ["two"], "spans": ["two"]}])
def test_answers_may_also_stand_by_themselves(name: str, answers: Any) -> None:
    row = TASKS[name].prepare({"answers": answers, "answers_spans": answers})
    assert row["answer"] == "two"
    assert row["answers"][0] == "two"


@pytest.mark.parametrize("name", ["squad", "drop"])
@pytest.mark.parametrize("answers", [None, {}, {"text": [], "spans": []}, [], 7])
def test_rows_without_an_answer_are_named(
    name: str, answers: Any, tmp_path: Path, letters: PreTrainedTokenizerFast
) -> None:
    case = next(case for case in CASES if case.task == name)
    broken = {key: value for key, value in case.row.items() if not key.startswith("answers")}
    rows = [broken | {"answers": answers, "answers_spans": answers}, case.row]
    with pytest.raises(DataError, match=r"data\.completion: row 1 of train\.jsonl: unknown field 'answer'"):
        loaded(name, rows, tmp_path, letters)


@pytest.mark.parametrize("name", TASKS)
def test_rows_of_something_else_are_refused_with_their_name(
    name: str, tmp_path: Path, letters: PreTrainedTokenizerFast
) -> None:
    for row in ({"text": "a film"}, dict.fromkeys(next(c for c in CASES if c.task == name).row, None)):
        with pytest.raises(DataError, match=r"data\.\w+: row \d of train\.jsonl: .*field"):
            loaded(name, [row, row], tmp_path, letters)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_complete_by_itself(name: str) -> None:
    task = TASKS[name]
    assert task.name == name
    assert task.summary
    assert task.citation
    config = task.complete(DataConfig(task=name))
    form(config)
    assert isinstance(locate(str(config.train), "train"), Hub)
    assert locate(str(config.train), "train") != locate(str(config.validation), "validation")
    assert config.train_size is not None
    assert config.validation_size is not None


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("keys", [{}, {"train": "a.jsonl"}, {"train": "a.jsonl", "validation": "b.jsonl"}])
def test_completing_twice_changes_nothing(name: str, keys: dict[str, Any]) -> None:
    task = TASKS[name]
    once = task.complete(DataConfig(task=name, **keys))
    assert task.complete(once) == once
    assert task.complete(DataConfig.model_validate(once.model_dump(exclude_none=True))) == once


@pytest.mark.parametrize("name", TASKS)
def test_a_completed_configuration_is_written_and_read_back(name: str, tmp_path: Path) -> None:
    table = {"output": "a", "model": {"path": "b"}, "data": {"task": name}}
    config = configuration.parse(table)
    config = config.model_copy(update={"data": TASKS[name].complete(config.data)})
    (tmp_path / "config.toml").write_text(configuration.dump(config))
    assert configuration.load(tmp_path / "config.toml") == config


def test_sizes_are_those_of_the_protocol() -> None:
    sizes = {name: (task.defaults.train_size, task.defaults.validation_size) for name, task in TASKS.items()}
    assert sizes == {
        "sst2": (1000, 872),
        "rte": (1000, 277),
        "cb": (150, 56),
        "boolq": (1000, 1000),
        "wic": (1000, 638),
        "wsc": (454, 104),
        "copa": (300, 100),
        "multirc": (1000, 1000),
        "squad": (1000, 1000),
        "drop": (1000, 1000),
    }


def test_sst2_is_that_of_mezo() -> None:
    config = TASKS["sst2"].complete(DataConfig(task="sst2"))
    problem = form(config)
    assert isinstance(problem, Classification)
    assert (config.train, config.validation) == ("stanfordnlp/sst2:train", "stanfordnlp/sst2:validation")


def test_explicit_keys_win() -> None:
    given = DataConfig(
        task="sst2", train="a.jsonl", validation="b.jsonl", prompt="{text}?", candidates=[" no", " yes"], train_size=7
    )
    config = TASKS["sst2"].complete(given)
    expected = given.model_copy(update={"label": "label", "validation_size": 872})
    assert config == expected


def test_own_training_rows_are_not_paired_with_the_official_validation_rows() -> None:
    config = TASKS["sst2"].complete(DataConfig(task="sst2", train="a.jsonl"))
    assert config.validation is None
    assert config.validation_size is None
    assert TASKS["sst2"].complete(DataConfig(task="sst2", validation="b.jsonl")).train == "stanfordnlp/sst2:train"


def test_templates_of_tasks_name_their_fields() -> None:
    assert Template.parse("data.prompt", TASKS["sst2"].defaults.prompt or "").fields == {"sentence"}


OFFICIAL = Path(os.environ.get("ZOTUNE_DATA") or "/nowhere")
"""A folder with the rows of the data sets, gzipped JSON lines by data set and split."""


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="ZOTUNE_DATA names no folder with the data sets")
@pytest.mark.parametrize("name", TASKS)
def test_the_official_rows_can_be_read(name: str, letters: PreTrainedTokenizerFast) -> None:
    folder = OFFICIAL / {"wsc": "wsc.fixed"}.get(name, name)
    paths = [folder / f"{split}.jsonl.gz" for split in ("train", "validation")]
    sizes = {"train_size": 50, "validation_size": 50}
    if paths[0].exists():
        data = load(DataConfig(task=name, train=str(paths[0]), validation=str(paths[1]), **sizes), letters, CONTEXT)
    else:
        data = load(DataConfig(task=name, train=str(paths[1]), **sizes), letters, CONTEXT)
    assert (len(data.train), len(data.validation)) == (50, 50)
    assert all(each.answers for each in data.validation) == (TASKS[name].metric == "f1")
    assert not any("cut" in notice for notice in data.notices)
