import pytest

from zotune.data.templates import Template, lookup
from zotune.errors import DataError

ROW = {"text": "a film", "stars": 4, "share": 0.5, "none": None, "many": ["a"], "a b": "spaced"}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{text} It was", "a film It was"),
        ("{stars} stars: {text}", "4 stars: a film"),
        ("{{text}} {share}", "{text} 0.5"),
        ("{a b}", "spaced"),
        ("no fields\n", "no fields\n"),
        ("", ""),
    ],
)
def test_render(template, expected):
    assert Template.parse("data.prompt", template).render(ROW, "row 1") == expected


def test_fields():
    assert Template.parse("data.prompt", "{text} and {stars}, {text}").fields == {"text", "stars"}


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


@pytest.mark.parametrize(("field", "got"), [("none", "nothing"), ("many", "a list")])
def test_fields_without_text_are_refused(field, got):
    with pytest.raises(DataError, match=rf"row 2: the field '{field}' holds {got}"):
        lookup(ROW, field, "row 2", "data.label")
