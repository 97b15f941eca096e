import json
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level

from zotune.config import DataConfig
from zotune.data import load
from zotune.data.split import Drawn
from zotune.errors import DataError

TOKENIZER = byte_level(bos=True)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(train, **keys) -> DataConfig:
    return DataConfig(train=train, prompt="{text} It was", candidates=[" terrible", " great"], label="label", **keys)


def rows(count, distinct, seed=0):
    draw = random.Random(seed)
    return [{"text": f"film {draw.randrange(distinct)}", "label": number % 2} for number in range(count)]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 99), sizes=st.sampled_from([{}, {"train_size": 20}, {"train_size": 12, "validation_size": 6}])
)
def test_no_row_lies_on_both_sides(tmp_path, seed, sizes):
    chosen = config(write(tmp_path / "rows.jsonl", rows(40, 60, seed)), split_seed=seed, **sizes)
    data = load(chosen, TOKENIZER, 64)
    assert not set(data.train) & set(data.validation)
    assert load(chosen, TOKENIZER, 64) == data


def test_rows_left_out_are_made_up_for_by_later_ones_and_told(tmp_path):
    made = [*rows(30, 10), *({"text": f"new {i}", "label": i % 2} for i in range(60))]
    data = load(config(write(tmp_path / "rows.jsonl", made), train_size=40, validation_size=20), TOKENIZER, 64)
    drawn = [(made[i]["text"], made[i]["label"]) for i in np.random.RandomState(0).permutation(90)]
    fit = [row for row in drawn[40:] if row not in drawn[:40]]
    texts = [TOKENIZER.decode(each.row.prompt, skip_special_tokens=True) for each in data.validation]
    assert len(data.train) == 40
    assert [text.removesuffix(" It was") for text in texts] == [text for text, _ in fit[:20]]
    told = "\n".join(data.notices)
    assert "rows that are training rows too were left out" in told
    assert "rows repeat another row" in told


def test_the_rows_of_tasks_stay_those_of_mezo_and_the_overlap_is_told(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"sentence": f"film {i % 9}", "label": i % 9 % 2} for i in range(30)])
    data = load(DataConfig(task="sst2", train=path, train_size=20, validation_size=10), TOKENIZER, 64)
    assert (len(data.train), len(data.validation)) == (20, 10)
    assert any(
        "validation: " in notice and "training rows too stay, and make the evaluation look better" in notice
        for notice in data.notices
    )


def test_rows_of_two_files_are_both_drawn_under_the_seed(tmp_path):
    train = write(tmp_path / "train.jsonl", [{"text": f"film {i}", "label": i % 2} for i in range(10)])
    validation = write(tmp_path / "validation.jsonl", [{"text": f"new {i}", "label": i % 2} for i in range(10)])
    data = load(config(train, validation=validation, split_seed=3, train_size=6, validation_size=4), TOKENIZER, 64)
    drawn = np.random.RandomState(3).permutation(10)
    for kind, examples, number in (("film", data.train, 6), ("new", data.validation, 4)):
        texts = [TOKENIZER.decode(each.row.prompt, skip_special_tokens=True) for each in examples]
        assert texts == [f"{kind} {i} It was" for i in drawn[:number]]


def test_rows_are_read_in_the_order_of_the_file_and_given_in_that_of_the_draw():
    read: list[int] = []

    class Recording:
        def __getitem__(self, index: int) -> dict[str, int]:
            read.append(index)
            return {"n": index}

    drawn = Drawn("rows.jsonl", Recording(), np.array([5, 0, 3, 1]), lambda row, where: row)
    assert drawn[:3].rows() == [(f"row {i + 1} of rows.jsonl", {"n": i}) for i in (5, 0, 3)]
    assert read == [0, 3, 5]


def test_a_tenth_is_held_out_where_nobody_says_how_much(tmp_path):
    lines = [{"text": f"film {i}", "label": i % 2} for i in range(100)]
    data = load(config(write(tmp_path / "rows.jsonl", lines)), TOKENIZER, 64)
    assert (len(data.train), len(data.validation)) == (90, 10)


def test_overlap_of_two_files_is_told_and_left(tmp_path):
    train = write(tmp_path / "train.jsonl", [{"text": f"film {i}", "label": i % 2} for i in range(8)])
    validation = write(tmp_path / "validation.jsonl", [{"text": f"film {i}", "label": i % 2} for i in range(6, 10)])
    data = load(config(train, validation=validation), TOKENIZER, 64)
    assert len(data.validation) == 4
    assert "validation: 2 rows that are training rows too stay, and make the evaluation look better than it is" in (
        data.notices
    )


def test_nothing_but_repetitions_leaves_nothing_to_evaluate_on(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": f"film {i % 2}", "label": i % 2} for i in range(20)])
    with pytest.raises(DataError, match="all 2 rows that could be held out for validation are training rows too"):
        load(config(path), TOKENIZER, 64)


def test_rows_that_truncation_made_alike_are_told_as_that(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": f"film {i} was a film", "label": i % 2} for i in range(20)])
    with pytest.raises(DataError, match=r"training rows too once \d+ prompts were cut to 6 tokens\. Give other rows"):
        load(config(path, max_length=6), TOKENIZER, 64)


def test_one_prompt_with_two_labels_is_told_with_both_rows(tmp_path):
    lines = [{"text": f"film {i}", "label": i % 2} for i in range(8)]
    path = write(tmp_path / "rows.jsonl", [*lines, {"text": "film 3", "label": 0}])
    (told,) = [each for each in load(config(path), TOKENIZER, 64).notices if "but not its label" in each]
    assert told.startswith("1 row with the prompt of another row but not its label: ")
    assert {"row 4 of rows.jsonl", "row 9 of rows.jsonl"} == set(told.partition(": ")[2].split(" and "))


def test_fields_by_other_names(tmp_path):
    lines = [{"review": {"body": f"film {i} "}, "stars": [i % 2]} for i in range(12)]
    path = write(tmp_path / "rows.jsonl", lines)
    sizes = {"train_size": 8, "validation_size": 4}
    named = DataConfig(task="sst2", train=path, **sizes, fields={"sentence": "review.body", "label": "stars.0"})
    plain = write(tmp_path / "plain.jsonl", [{"sentence": f"film {i}", "label": i % 2} for i in range(12)])
    assert load(named, TOKENIZER, 64).train == load(DataConfig(task="sst2", train=plain, **sizes), TOKENIZER, 64).train
    with pytest.raises(DataError, match=r"data\.fields: row \d+ of rows.jsonl: the field 'review' has no 'text' in it"):
        load(named.model_copy(update={"fields": {"sentence": "review.text"}}), TOKENIZER, 64)


def test_what_is_wrong_in_unused_fields_and_rows_is_none_of_our_business(tmp_path):
    lines = [json.dumps({"text": f"film {i}", "label": i % 2, "other": None}) for i in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(line.replace("null", "NaN") for line in lines))
    assert len(load(config(str(path)), TOKENIZER, 64).train) == 27
    path.write_text("\n".join(line.replace('"label": 0', '"label": NaN') for line in lines))
    with pytest.raises(DataError, match=r"row \d+ of rows.jsonl: the field 'label' holds nan"):
        load(config(str(path)), TOKENIZER, 64)


def test_several_answers_and_the_text_of_tokens(tmp_path):
    lines = [{"q": f"film {i} ?", "a": {"text": ["great", "it was great", "great"]}} for i in range(8)]
    path = write(tmp_path / "rows.jsonl", lines)
    chosen = DataConfig(train=path, prompt="{q}", completion=" {a.text.0}", answers="a.text")
    data = load(chosen, TOKENIZER, 64)
    assert {example.answers for example in data.train} == {("great", "it was great")}
    assert data.decode(data.train[0].row.candidates[0].tokens) == " great"
    one = load(chosen.model_copy(update={"answers": "a.text.1"}), TOKENIZER, 64)
    assert one.train[0].answers == ("it was great",)
    for field, message in [("a", "holds a dict"), ("b", "unknown field 'b'")]:
        with pytest.raises(DataError, match=rf"data\.answers: row \d of rows.jsonl: .*{message}"):
            load(chosen.model_copy(update={"answers": field}), TOKENIZER, 64)
    with pytest.raises(DataError, match="an empty list"):
        load(
            chosen.model_copy(
                update={
                    "train": write(tmp_path / "b.jsonl", [{"q": "a", "a": {"text": []}}] * 4),
                    "completion": " great",
                }
            ),
            TOKENIZER,
            64,
        )
