import json
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import byte_level

from zotune.config import DataConfig
from zotune.data import BatchOrder, Dataset, load
from zotune.errors import ConfigError, DataError
from zotune.objectives import CandidateCrossEntropy, CompletionNLL

TOKENIZER = byte_level(bos=True)
CONTEXT = 64


def write(path, count, start=0):
    """Rows whose texts are their numbers, with alternating labels."""
    rows = [{"text": f"film {number}", "label": number % 2} for number in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(train, **keys) -> DataConfig:
    return DataConfig(train=train, prompt="{text} It was", candidates=[" terrible", " great"], label="label", **keys)


def numbers(examples) -> list[int]:
    """The numbers of the rows, from their tokens."""
    texts = [TOKENIZER.decode(example.row.prompt, skip_special_tokens=True) for example in examples]
    return [int(text.removeprefix("film ").removesuffix(" It was")) for text in texts]


def split(data: Dataset) -> tuple[list[int], list[int]]:
    return numbers(data.train), numbers(data.validation)


def test_one_file_is_split_by_the_permutation_of_mezo(tmp_path):
    path = write(tmp_path / "rows.jsonl", 40)
    train, validation = split(load(config(path, train_size=20, validation_size=10), TOKENIZER, CONTEXT))
    np.random.seed(0)
    drawn = np.random.permutation(40).tolist()
    assert train == drawn[:20]
    assert validation == drawn[20:30]


def test_the_split_follows_its_seed(tmp_path):
    path = write(tmp_path / "rows.jsonl", 40)
    first, again, other = (load(config(path, split_seed=seed), TOKENIZER, CONTEXT) for seed in (3, 3, 4))
    assert first == again
    assert split(first) != split(other)


@pytest.mark.parametrize(
    ("count", "keys", "sizes"),
    [
        (40, {}, (36, 4)),
        (5, {}, (4, 1)),
        (40, {"validation_size": 15}, (25, 15)),
        (40, {"train_size": 15}, (15, 25)),
        (40, {"train_size": 39, "validation_size": 500}, (39, 1)),
    ],
)
def test_sizes_of_one_file(tmp_path, count, keys, sizes):
    train, validation = split(load(config(write(tmp_path / "rows.jsonl", count), **keys), TOKENIZER, CONTEXT))
    assert (len(train), len(validation)) == sizes
    assert not set(train) & set(validation)


def test_at_most_500_rows_are_held_out(tmp_path):
    for keys in ({}, {"train_size": 5000}):
        data = load(config(write(tmp_path / "rows.jsonl", 6000), **keys), TOKENIZER, CONTEXT)
        assert len(data.validation) == 500
        assert len(data.train) == keys.get("train_size", 5500)


@pytest.mark.parametrize(("keys", "sizes"), [({}, (30, 12)), ({"train_size": 10, "validation_size": 5}, (10, 5))])
def test_validation_rows_of_their_own(tmp_path, keys, sizes):
    train, validation = write(tmp_path / "train.jsonl", 30), write(tmp_path / "validation.jsonl", 12, start=100)
    data = load(config(train, validation=validation, **keys), TOKENIZER, CONTEXT)
    assert (len(data.train), len(data.validation)) == sizes
    assert max(numbers(data.train)) < 100 <= min(numbers(data.validation))


def test_labels_stay_with_their_rows(tmp_path):
    data = load(config(write(tmp_path / "rows.jsonl", 40)), TOKENIZER, CONTEXT)
    examples = data.train + data.validation
    assert [example.gold for example in examples] == [number % 2 for number in numbers(examples)]


def test_notices_tell_balance_truncation_and_missing_rows(tmp_path):
    train, validation = write(tmp_path / "train.jsonl", 4), write(tmp_path / "validation.jsonl", 1, start=100)
    long = {"text": "long " * 100, "label": 1}
    with open(train, "a") as file:
        file.write(json.dumps(long) + "\n")
    data = load(config(train, validation=validation, train_size=9), TOKENIZER, CONTEXT)
    assert data.notices == (
        "train: data.train_size asks for 9 rows, but there are only 5",
        "train: 5 rows, terrible 40.0 %, great 60.0 %",
        "train: 1 of 5 prompts cut at the left, to fit 64 tokens",
        "validation: 1 row, terrible 100.0 %, great 0.0 %",
        "validation: only 0.0 % of the rows are 'great'",
        "validation: always 'terrible' would be right in 100.0 %; accuracy counts from there",
    )
    assert max(len(example.row.prompt) + 1 for example in data.train) == CONTEXT


def test_objectives(tmp_path):
    path = write(tmp_path / "rows.jsonl", 20)
    assert load(config(path), TOKENIZER, CONTEXT).objective == CandidateCrossEntropy(normalised=False)
    assert load(config(path, bos="none"), TOKENIZER, CONTEXT).train[0].row.prompt[0] != TOKENIZER.bos_token_id
    completion = DataConfig(train=path, prompt="{text}", completion=" It was {label}")
    data = load(completion, TOKENIZER, CONTEXT)
    assert data.objective == CompletionNLL()
    assert data.train[0].row.candidates[0].tokens[-1] == TOKENIZER.eos_token_id


def test_candidates_that_no_loss_counts_are_not_trained_on(tmp_path):
    path = write(tmp_path / "rows.jsonl", 20)
    chosen, told = (load(config(path, loss=loss), TOKENIZER, CONTEXT) for loss in ("candidates", "gold"))
    assert told.objective == CompletionNLL()
    assert told.validation == chosen.validation
    for alone, example in zip(told.train, chosen.train, strict=True):
        assert alone.row.candidates == (example.row.candidates[example.gold],)
        assert (alone.row.prompt, alone.gold) == (example.row.prompt, 0)


def test_a_task_takes_local_files(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"sentence": f"film {number} ", "label": number % 2} for number in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(DataConfig(task="sst2", train=str(path), train_size=20), TOKENIZER, CONTEXT)
    assert sorted(numbers(data.train + data.validation)) == list(range(30))
    assert "train: 20 rows, terrible " in data.notices[0]


def test_what_is_written_ends_at_eos_or_a_line_break(tmp_path):
    # This tokenizer puts a space before the line break, which ends nothing.
    spaced, chosen = byte_level(prefix_space=True), config(write(tmp_path / "rows.jsonl", 9))
    endless = deepcopy(spaced)
    endless.eos_token = None
    line_break = spaced.encode("a\n")[-1]
    assert load(chosen, spaced, CONTEXT).stop == (spaced.eos_token_id, line_break)
    assert load(chosen, endless, CONTEXT).stop == (line_break,)


@pytest.mark.parametrize("seed", [2**32, 2**70])
def test_split_seeds_that_numpy_cannot_take(tmp_path, seed):
    path = write(tmp_path / "rows.jsonl", 9)
    with pytest.raises(ConfigError, match=r"data\.split_seed"):
        load(config(path, split_seed=seed), TOKENIZER, CONTEXT)
    assert len(load(config(path, split_seed=2**32 - 1), TOKENIZER, CONTEXT).train) == 8


def test_a_length_beyond_the_context_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.max_length: 65 is more than the model's context of 64"):
        load(config(write(tmp_path / "rows.jsonl", 9), max_length=65), TOKENIZER, CONTEXT)


@pytest.fixture
def grown():
    """The tokenizer with a token that the model does not have, and the number of those that it has."""
    made = deepcopy(TOKENIZER)
    count = len(made)
    made.add_tokens("<new>")
    return made, count


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"prompt": "{text} <new> It was"}, r"row \d of train\.jsonl"),
        ({"candidates": [" terrible", " <new>"]}, r"row \d of train\.jsonl"),
        ({"validation": "new.jsonl"}, r"row 2 of new\.jsonl"),
        ({"bos": len(TOKENIZER)}, r"data\.bos"),
    ],
)
def test_a_token_without_an_embedding_is_refused(tmp_path, monkeypatch, grown, changed, where):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", 9)
    (tmp_path / "new.jsonl").write_text('{"text": "film 9", "label": 0}\n{"text": "<new>", "label": 1}\n')
    tokenizer, count = grown
    chosen = config("train.jsonl").model_copy(update=changed)
    found = rf"^{where}: the token '<new>' has the id {count}, but the model has {count} embeddings \(ids 0 to "
    with pytest.raises(DataError, match=found):
        load(chosen, tokenizer, CONTEXT, count)
    assert load(chosen, tokenizer, CONTEXT, count + 1) == load(chosen, tokenizer, CONTEXT)


def test_bad_data(tmp_path):
    path, empty = write(tmp_path / "rows.jsonl", 9), write(tmp_path / "empty.jsonl", 0)
    one_class = tmp_path / "one.jsonl"
    one_class.write_text('{"text": "a film", "label": 1}\n' * 9)
    for given_config, message in [
        (config(None), "data.train is missing"),
        (config(empty), "empty.jsonl has no rows"),
        (config(path, validation=empty), "empty.jsonl has no rows"),
        (config(path, validation=path), "are the same rows"),
        (config(path, train_size=9), "9 rows: too few to train on 9"),
        (config(path, validation_size=9), "9 rows: too few .* validate on 9"),
        (config(str(one_class)), "the class 'great'"),
        (config(path).model_copy(update={"prompt": "{txt}"}), r"row \d of rows.jsonl: unknown field 'txt'"),
        (config(path).model_copy(update={"candidates": [" great", ""]}), "adds no tokens"),
        (config(path).model_copy(update={"candidates": [" great", " great"]}), "same tokens"),
    ]:
        with pytest.raises(DataError, match=message):
            load(given_config, TOKENIZER, CONTEXT)


@given(n=st.integers(1, 30), batch_size=st.integers(1, 70), seed=st.integers(0, 2**64), epochs=st.integers(1, 3))
def test_every_epoch_is_a_permutation(n, batch_size, seed, epochs):
    order = BatchOrder(n, batch_size, seed)
    batches = [order.indices(step) for step in range(-(-n * epochs // batch_size))]
    assert {len(batch) for batch in batches} == {batch_size}
    taken = [index for batch in batches for index in batch]
    for epoch in range(epochs):
        assert sorted(taken[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(step=st.integers(0, 10**9), others=st.lists(st.integers(0, 10**4), max_size=6))
def test_the_order_is_a_function_of_the_step_alone(step, others):
    expected = BatchOrder(37, 16, 5).indices(step)
    order = BatchOrder(37, 16, 5)
    for other in others:
        order.indices(other)
    assert order.indices(step) == expected


def test_the_order_is_fixed_for_good():
    # Journals name the rows of a step by its number alone, so another order would break every run there is.
    assert BatchOrder(10, 4, 0).indices(0) == (0, 8, 9, 3)
    assert BatchOrder(10, 4, 0).indices(2) == (6, 4, 3, 7)


def test_epochs_and_seeds_differ():
    first, second = (BatchOrder(50, 50, 0).indices(step) for step in (0, 1))
    assert len({first, second, BatchOrder(50, 50, 1).indices(0), tuple(range(50))}) == 4


@pytest.mark.parametrize("arguments", [(0, 4, 0), (4, 0, 0)])
def test_nothing_to_order_is_refused(arguments):
    with pytest.raises(ValueError, match="at least one"):
        BatchOrder(*arguments)


def test_steps_before_the_first_are_refused():
    with pytest.raises(ValueError, match="counted from 0"):
        BatchOrder(4, 2, 0).indices(-1)
