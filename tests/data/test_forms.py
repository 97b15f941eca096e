import pytest
from tiny_tokenizers import byte_level, merging, words

from zotune.config import DataConfig
from zotune.data.encode import Encoder
from zotune.data.forms import form
from zotune.errors import DataError
from zotune.objectives import CandidateCrossEntropy, CompletionNLL
from zotune.rows import Example, checksum

ENCODER = Encoder(words(), 100)
REVIEWS = {"prompt": "{text} It was", "candidates": [" terrible", " great"], "label": "label"}


def gold(label, candidates=(" terrible", " great")) -> int:
    problem = form(DataConfig(prompt="{text}", candidates=list(candidates), label="label"))
    (example,) = problem.examples(
        [("row 5 of rows.csv", {"text": "a film", "label": label})], Encoder(byte_level(), 100)
    ).examples
    return example.gold


@pytest.mark.parametrize(
    ("label", "expected"), [(0, 0), (1, 1), (1.0, 1), (True, 1), ("1", 1), ("great", 1), (" terrible ", 0)]
)
def test_labels(label, expected):
    assert gold(label) == expected


def test_labels_that_are_numbers_in_the_candidates():
    assert [gold(label, (" four", " five", " 2")) for label in ("2", 2)] == [2, 2]
    assert gold("1", (" 1", " five")) == gold("1.0", (" 1", " five")) == 0
    assert gold(True, (" False", " True")) == 1


@pytest.mark.parametrize(
    ("label", "candidates"),
    [
        (1, (" 1", " five")),
        (1.0, (" 1", " 2")),
        (1, (" 1.0", " 2.0")),
        (True, (" true", " false")),
        (True, (" 1", " 0")),
    ],
)
def test_labels_of_two_meanings_are_refused(label, candidates):
    with pytest.raises(DataError, match="is the text of candidate 0, but"):
        gold(label, candidates)


@pytest.mark.parametrize("label", [2, -1, 0.5, "good", "2", "nan", ""])
def test_labels_out_of_range_are_refused(label):
    with pytest.raises(DataError, match=r"row 5 of rows\.csv: the label is .* numbers 0 to 1 .*terrible, great"):
        gold(label)


def test_a_label_field_that_is_not_there():
    with pytest.raises(DataError, match=r"data\.label: row 1 of rows: unknown field 'label'.*Known: lable, text"):
        form(DataConfig(**REVIEWS)).examples([("row 1 of rows", {"text": "a film", "lable": 1})], ENCODER)


def test_classification_tells_its_balance():
    rows = [(f"row {i}", {"text": "a film", "label": label}) for i, label in enumerate([0, 1, 1])]
    part = form(DataConfig(**REVIEWS)).examples(rows, ENCODER)
    assert part.summary == "3 rows, terrible 33.3 %, great 66.7 %"
    assert [example.gold for example in part.examples] == [0, 1, 1]


def test_one_class_is_nothing_to_learn():
    problem = form(DataConfig(**REVIEWS))
    rows = [(f"row {i}", {"text": "a film", "label": 1}) for i in range(3)]
    with pytest.raises(DataError, match=r"all training rows \(3\) have the class 'great'"):
        problem.check_training(problem.examples(rows, ENCODER).examples)


def test_candidates_may_differ_from_row_to_row():
    problem = form(DataConfig(prompt="{text}", candidates=[" {a}", " {b}"], label="label"))
    rows = [
        ("row 1", {"text": "a film", "a": "dull", "b": "great", "label": "great"}),
        ("row 2", {"text": "the year", "a": "dull and long", "b": "worst", "label": 1}),
    ]
    part = problem.examples(rows, ENCODER)
    assert [example.gold for example in part.examples] == [1, 1]
    problem.check_training(part.examples)
    assert part.summary == "2 rows, {a} 0.0 %, {b} 100.0 %"


@pytest.mark.parametrize(("second", "normalised"), [(" great", False), (" very great", True)])
def test_the_normaliser_is_needed_unless_all_candidates_are_one_token(second, normalised):
    problem = form(DataConfig(prompt="{text}", candidates=[" terrible", second], label="label"))
    examples = problem.examples([("row 1", {"text": "a film", "label": 0})], ENCODER).examples
    assert problem.objective(examples) == CandidateCrossEntropy(normalised)


def test_a_prompt_that_merges_with_its_answer_is_written_on_from_without_it():
    rows = [(f"row {number}", row) for number, row in enumerate([{"q": "eab", "a": "ce"}, {"q": "ea", "a": "e"}])]
    tokenizer, config = merging(), DataConfig(prompt="{q}", completion="{a}", answers="a")
    problem = form(config)
    merged, plain = examples = problem.examples(rows, Encoder(tokenizer, 100)).examples
    assert merged.row.prompt == tuple(tokenizer.convert_tokens_to_ids(["e", "abc"]))
    assert merged.prompt == tuple(tokenizer.convert_tokens_to_ids(["e", "ab"]))
    assert plain.prompt == plain.row.prompt

    # Evaluations of what was written from other prompts cannot be compared; training is what it was.
    without = tuple(Example(example.row, answers=example.answers) for example in examples)
    assert checksum(examples) != checksum(without)
    assert checksum(problem.learnt(examples)) == checksum(without)
    nothing_written = form(config.model_copy(update={"answers": None})).examples(rows, Encoder(tokenizer, 100)).examples
    assert nothing_written == tuple(Example(example.row) for example in examples)


def test_completion():
    problem = form(DataConfig(prompt="{text}", completion=" {text} great"))
    part = problem.examples([("row 1", {"text": "a film"})], ENCODER)
    assert part.summary == "1 row, 4 tokens to learn"
    assert part.examples[0].gold == 0
    assert problem.objective(part.examples) == CompletionNLL()
    problem.check_training(part.examples)


def test_an_answer_must_not_begin_where_writing_ends():
    keys = {"prompt": "{text}\nIt was", "completion": " \n{text}", "answers": "text"}
    with pytest.raises(DataError, match=r"row 1: it begins with a line break, .* at the end of data\.prompt"):
        form(DataConfig(**keys)).examples([("row 1", {"text": "great"})], ENCODER)
    form(DataConfig(**keys | {"answers": None})).examples([("row 1", {"text": "great"})], ENCODER)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt": "{text}"}, "not what to learn"),
        ({**REVIEWS, "completion": "{text}"}, "both data.completion and data.candidates"),
        ({"candidates": [" a", " b"], "label": "label"}, "data.prompt is missing"),
        ({"prompt": "{text}", "candidates": [" a", " b"]}, "data.label is missing"),
        ({"prompt": "{text}", "label": "label"}, "data.candidates is missing"),
        ({**REVIEWS, "answers": "right"}, "data.answers goes with data.completion only"),
        ({**REVIEWS, "candidates": [" a"]}, "has only 1; classification needs"),
        ({"prompt": "{text}", "completion": "{text}", "loss": "gold"}, "data.loss is set"),
        ({**REVIEWS, "prompt": "{text"}, "data.prompt: cannot read the template"),
    ],
)
def test_configurations_that_say_too_little_or_too_much(keys, message):
    with pytest.raises(DataError, match=message):
        form(DataConfig(**keys))
