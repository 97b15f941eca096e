import pytest

from zotune.data.templates import Template, lookup, texts
from zotune.errors import DataError

ROW = {
    "text": "a film",
    "stars": 4,
    "share": 0.5,
    "none": None,
    "many": ["a"],
    "a b": "spaced",
    "answers": {"text": ["nine", "9"]},
    "answers.text.1": "a field of its own",
    "nan": float("nan"),
    "endless": float("-inf"),
    "torn": "a \ud83d",
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{text} It was", "a film It was"),
        ("{stars} stars: {text}", "4 stars: a film"),
        ("{{text}} {share}", "{text} 0.5"),
        ("{a b}", "spaced"),
        ("{answers.text.0} {many.0}", "nine a"),
        ("{answers.text.1}", "a field of its own"),
        ("no fields\n", "no fields\n"),
        ("", ""),
    ],
)
def test_render(template, expected):
    assert Template.parse("data.prompt", template).render(ROW, "row 1") == expected


def test_fields():
    assert Template.parse("data.prompt", "{text} and {stars}, {text}!").fields == {"text", "stars"}


@pytest.mark.parametrize("template", ["{text", "text}", "{}", "{text!r}", "{stars:02d}", "{text:}}"])
def test_templates_that_are_not_plain_are_refused(template):
    with pytest.raises(DataError, match=r"data\.prompt: .*literal brace as \{\{"):
        Template.parse("data.prompt", template)


def test_a_field_that_is_not_there_is_named_with_the_nearest_and_all_others():
    with pytest.raises(DataError) as caught:
        Template.parse("data.prompt", "{txet} It was").render({"text": "a", "label": 0}, "row 7 of train.jsonl")
    message = str(caught.value)
    for part in ("data.prompt", "row 7 of train.jsonl", "'txet'", "Did you mean 'text'?", "label, text"):
        assert part in message


@pytest.mark.parametrize(
    ("field", "got"),
    [
        ("none", "nothing"),
        ("many", "a list"),
        ("answers", "a dict"),
        ("answers.text", "a list"),
        ("nan", "nan"),
        ("endless", "-inf"),
        ("torn", r"'\\ud83d' at character 2, half of a surrogate pair"),
    ],
)
def test_fields_without_text_are_refused(field, got):
    with pytest.raises(DataError, match=rf"row 2: the field '{field}' holds {got}"):
        lookup(ROW, field, "row 2", "data.label")


@pytest.mark.parametrize("field", ["answers.txt", "answers.text.2", "answers.text.-1", "many.²", "many.0.0", "text.0"])
def test_a_nested_field_that_is_not_there_is_named_with_what_holds_it(field):
    parent, _, name = field.rpartition(".")
    with pytest.raises(DataError, match=rf"row 2: the field '{parent}' has no '{name}' in it"):
        lookup(ROW, field, "row 2", "data.label")


def test_one_text_or_several():
    assert texts(ROW, "text", "row 2", "data.answers") == ("a film",)
    assert texts(ROW, "stars", "row 2", "data.answers") == ("4",)
    for several in (["x", 1, "x"], ("x", 1, "x")):
        assert texts({"a": several}, "a", "row 2", "data.answers") == ("x", "1")
    with pytest.raises(DataError, match=r"data\.answers: row 2: the field 'a\.1' holds nothing"):
        texts({"a": ["x", None]}, "a", "row 2", "data.answers")


def test_several_texts_of_a_field_whose_own_name_has_dots():
    row = {"answers.text": ["nine", "9"], "answers": {"text": ["ten"]}}
    assert texts(row, "answers.text", "row 2", "data.answers") == ("nine", "9")
