import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zotune.objectives import CandidateCrossEntropy, CompletionNLL, predictions
from zotune.rows import Candidate, Example, Row


def example(*lengths: int, gold: int = 0) -> Example:
    """An example with candidates of these many scored tokens."""
    return Example(Row((0,), tuple(Candidate((1,) * n, tuple(range(n))) for n in lengths)), gold)


@st.composite
def batches(draw):
    shapes = draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=5))
    examples = [example(*lengths, gold=draw(st.integers(0, len(lengths) - 1))) for lengths in shapes]
    total = sum(map(len, shapes))
    score = st.floats(-200, 0, width=32)
    scores = draw(st.lists(st.lists(score, min_size=total, max_size=total), min_size=1, max_size=3))
    return np.array(scores, dtype=np.float32), examples


def means(scores: np.ndarray, examples: list[Example]):
    """Per probe and example, the length-normalised scores."""
    for probe in scores.astype(np.float64):
        rest = list(probe)
        yield [[rest.pop(0) / len(each.scored) for each in one.row.candidates] for one in examples]


@given(batches())
def test_cross_entropy_and_predictions_against_a_plain_loop(batch):
    scores, examples = batch
    losses = CandidateCrossEntropy().losses(scores, examples)
    best = predictions(scores, examples)
    assert losses.shape == best.shape == (len(scores), len(examples))
    assert losses.dtype == np.float32
    assert best.dtype == np.int64
    for k, probe in enumerate(means(scores, examples)):
        for b, (one, values) in enumerate(zip(examples, probe, strict=True)):
            expected = -np.log(np.exp(np.array(values) - max(values)) / np.exp(np.array(values) - max(values)).sum())
            assert losses[k, b] == pytest.approx(expected[one.gold], rel=1e-6, abs=1e-6)
            assert best[k, b] == int(np.argmax(values))


@given(batches())
def test_completion_loss_is_the_mean_over_the_gold_tokens(batch):
    scores, examples = batch
    losses = CompletionNLL().losses(scores, examples)
    assert losses.dtype == np.float32
    expected = [
        [-values[one.gold] for one, values in zip(examples, probe, strict=True)] for probe in means(scores, examples)
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-6)


def test_a_constant_per_row_cancels_for_single_tokens_only():
    shift = np.float32(3)
    single, mixed = [example(1, 1, gold=1)], [example(1, 2, gold=1)]
    scores = np.array([[-1, -2]], dtype=np.float32)
    loss = CandidateCrossEntropy().losses
    np.testing.assert_allclose(loss(scores + shift, single), loss(scores, single), rtol=1e-6)
    assert abs(loss(scores + shift, mixed) - loss(scores, mixed)).item() > 0.1
    assert not CandidateCrossEntropy.for_examples(single).normalised
    assert CandidateCrossEntropy.for_examples(single + mixed).normalised
    assert CompletionNLL().normalised


def test_far_apart_scores_neither_overflow_nor_vanish():
    losses = CandidateCrossEntropy().losses(np.array([[-1e6, 0.0]], dtype=np.float32), [example(1, 1)])
    assert losses.item() == pytest.approx(1e6)


def test_nan_reaches_its_own_example_only():
    scores = np.array([[np.nan, -1, -2, -1], [-1, -2, -1, -2]], dtype=np.float32)
    examples = [example(1, 1), example(1, 1)]
    for objective in (CandidateCrossEntropy(), CompletionNLL()):
        assert np.isnan(objective.losses(scores, examples)).tolist() == [[True, False], [False, False]]
    assert predictions(scores, examples).tolist() == [[-1, 1], [0, 0]]


@pytest.mark.parametrize("gold", [0, 1])
def test_an_impossible_gold_candidate_costs_infinitely_much(gold):
    scores = np.array([[-np.inf, -1]], dtype=np.float32)
    loss = CandidateCrossEntropy().losses(scores, [example(1, 1, gold=gold)]).item()
    assert loss == (np.inf if gold == 0 else 0)


def test_impossible_candidates_all_round_are_not_a_number():
    scores = np.array([[-np.inf, -np.inf]], dtype=np.float32)
    assert np.isnan(CandidateCrossEntropy().losses(scores, [example(1, 1)])).all()


@pytest.mark.parametrize("columns", [3, 5])
def test_scores_of_another_batch_are_refused(columns):
    with pytest.raises(ValueError, match=r"4 candidates"):
        CandidateCrossEntropy().losses(np.zeros((1, columns), np.float32), [example(1, 1), example(1, 1)])
