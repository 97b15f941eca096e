from zotune.data.report import balance, contradictions, repeats
from zotune.rows import Candidate, Example, Row


def examples(*gold):
    return [
        Example(Row((number + 9,), (Candidate((1,), (0,)), Candidate((2,), (0,)))), index)
        for number, index in enumerate(gold)
    ]


def test_equal_classes_are_told_by_the_accuracy_of_guessing_alone():
    told = balance(("no", "yes"), examples(0, 1, 0, 1), examples(0, 0, 1, 0))
    assert told == ["validation: always 'no' would be right in 75.0 %; accuracy counts from there"]


def test_rare_classes_and_splits_that_differ_are_told():
    told = balance(("no", "yes"), examples(*[0] * 95, *[1] * 5), examples(*[0] * 50, *[1] * 50))
    assert told[0] == "train: only 5.0 % of the rows are 'yes'"
    assert told[1] == "'no' is 95.0 % of the training rows but 50.0 % of the validation rows"


def test_chance_differences_of_few_rows_are_not():
    assert len(balance(("no", "yes"), examples(*[0, 1] * 20), examples(0, 0, 0, 1))) == 1


def test_many_classes_are_not_all_rare():
    names = tuple(map(str, range(20)))
    assert len(balance(names, examples(*range(20)), examples(*range(20)))) == 1


def test_candidates_that_differ_from_row_to_row_have_no_balance():
    assert balance((), examples(0, 1), examples(0)) == []


def test_repetitions_count_the_label_and_contradictions_are_about_it():
    first, second = examples(0, 1)
    other = Example(first.row, 1)
    assert repeats("train", [first, second, first, other]) == ["train: 1 of 4 rows repeat another row"]
    assert repeats("train", [first, second]) == []
    assert contradictions([first, second, other], ["row 1", "row 2", "row 3"]) == [
        "1 row with the prompt of another row but not its label: row 3 and row 1"
    ]
