from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zotune.answers import exact_match, f1, normalise

WORDS = st.lists(st.sampled_from(["river", "Rhine", "castle", "1945", "blue"]), min_size=1, max_size=6).map(" ".join)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Rhine, a river.", "rhine river"),
        ("an apple a day", "apple day"),
        ("Anthem of another area", "anthem of another area"),
        ("U.S.A.", "usa"),
        ("  $12\n", "12"),
        ("the", ""),
        ("Zürich’s", "zürich’s"),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_the_best_of_several_answers_counts() -> None:
    answers = ("October 1973", "in October", "1973")
    assert exact_match("1973.", answers)
    assert not exact_match("October", answers)
    # One word of one written and of two right ones: 2 * 1 / (1 + 2).
    assert f1("October", answers) == pytest.approx(2 / 3)
    assert f1("November", answers) == 0


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("the blue castle", "castle", 2 / 3),
        ("castle castle", "castle", 2 / 3),
        ("castle castle", "castle castle wall", 4 / 5),
        ("", "castle", 0),
        ("castle", "the", 0),
        ("a", "the", 1),
        ("", "", 1),
    ],
)
def test_f1_by_hand(text: str, answer: str, expected: float) -> None:
    assert f1(text, [answer]) == pytest.approx(expected)


def test_without_answers_nothing_is_right() -> None:
    assert not exact_match("", ())
    assert f1("", ()) == 0


@given(WORDS, WORDS)
def test_f1_is_symmetric_within_bounds_and_follows_from_precision_and_recall(a: str, b: str) -> None:
    assert f1(a, [b]) == f1(b, [a])
    assert 0 <= f1(a, [b]) <= 1
    rest, common = normalise(b).split(), 0
    for word in normalise(a).split():
        if word in rest:
            rest.remove(word)
            common += 1
    precision, recall = common / len(a.split()), common / len(b.split())
    assert f1(a, [b]) == pytest.approx(2 * precision * recall / (precision + recall) if common else 0)


@given(st.text(), st.lists(st.text(), max_size=3))
def test_any_text_is_judged(text: str, answers: list[str]) -> None:
    assert exact_match(text, [*answers, text])
    assert f1(text, [*answers, text]) == 1
    assert normalise(normalise(text)) == normalise(text)
    assert f1(text, answers) >= exact_match(text, answers)
