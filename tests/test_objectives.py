import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zotune.objectives import (
    PRIOR,
    CalibratedCrossEntropy,
    CandidateCrossEntropy,
    CompletionNLL,
    batch_losses,
    calibrated,
    predictions,
)
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


def test_a_batch_has_the_mean_of_its_losses_in_double_precision():
    scores = np.array([[-1, -1, -2], [-1, -2, -4]], dtype=np.float32)
    assert batch_losses(CompletionNLL(), scores, [example(1)] * 3) == [4 / 3, 7 / 3]


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
    with np.errstate(all="raise"):
        assert np.isnan(CandidateCrossEntropy().losses(scores, [example(1, 1)])).all()


@pytest.mark.parametrize("columns", [3, 5])
def test_scores_of_another_batch_are_refused(columns):
    with pytest.raises(ValueError, match=r"4 candidates"):
        CandidateCrossEntropy().losses(np.zeros((1, columns), np.float32), [example(1, 1), example(1, 1)])


@st.composite
def classifications(draw):
    """Scores of answers that are the same for all examples, and the examples."""
    lengths = draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))
    golds = draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6))
    score = st.floats(-20, 0, width=32)
    total = len(lengths) * len(golds)
    scores = draw(st.lists(st.lists(score, min_size=total, max_size=total), min_size=1, max_size=3))
    return np.array(scores, dtype=np.float32), [example(*lengths, gold=gold) for gold in golds]


def shifted(scores: np.ndarray, examples: list[Example], bias: np.ndarray) -> np.ndarray:
    """The plain mean losses with this bias off every mean log-likelihood, and its penalty, one per probe."""
    lengths = [len(each.scored) for each in examples[0].row.candidates]
    moved = scores - np.tile(bias * lengths, len(examples))
    return CandidateCrossEntropy().losses(moved, examples).mean(1) + (bias**2).sum() / (2 * PRIOR**2 * len(examples))


@given(classifications(), st.integers(0, 2**32 - 1))
def test_calibration_fits_the_bias_that_makes_the_loss_smallest(batch, seed):
    scores, examples = batch
    lowest = CalibratedCrossEntropy(CandidateCrossEntropy()).losses(scores, examples).mean(1)
    count = len(examples[0].row.candidates)
    draws = np.random.default_rng(seed).normal(0, 3, (20, count))
    for bias in (np.zeros(count), *draws):
        assert (lowest <= shifted(scores, examples, bias) + 1e-4).all()


def test_calibration_finds_the_bias_of_two_answers_by_hand():
    """Where no margin differs between examples, the optimum is one equation, solved here by bisection."""
    examples = [example(1, 1, gold=int(i < 3)) for i in range(4)]
    scores = np.tile(np.array([0.0, 2.0], dtype=np.float32), 4)[None]
    low, high = -10.0, 10.0
    for _ in range(80):
        bias = (low + high) / 2  # of the second answer; the first has its negative
        slope = 0.75 - 1 / (1 + np.exp(-(2 - 2 * bias))) + bias / (PRIOR**2 * 4)
        low, high = (bias, high) if slope < 0 else (low, bias)
    expected = shifted(scores, examples, np.array([-bias, bias]))
    found = CalibratedCrossEntropy(CandidateCrossEntropy()).losses(scores, examples).mean(1)
    assert found == pytest.approx(expected, abs=1e-6)


def test_what_all_examples_share_hardly_counts_once_it_is_calibrated():
    rng = np.random.default_rng(0)
    examples = [example(1, 1, gold=int(i % 2)) for i in range(16)]
    scores = rng.normal(0, 1, (1, 32)).astype(np.float32)
    preferring = scores + np.tile(np.array([0, 3], dtype=np.float32), 16)
    plain, fitted = CandidateCrossEntropy(), CalibratedCrossEntropy(CandidateCrossEntropy())
    moved = [float(np.ptp([each.losses(s, examples).mean() for s in (scores, preferring)])) for each in (plain, fitted)]
    assert moved[1] < 0.2 * moved[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_probe_that_is_not_finite_leaves_the_others_alone(bad):
    examples = [example(1, 1, gold=int(i % 2)) for i in range(4)]
    scores = np.random.default_rng(1).normal(0, 1, (3, 8)).astype(np.float32)
    objective = CalibratedCrossEntropy(CandidateCrossEntropy())
    before = objective.losses(scores, examples)
    scores[1, 3] = bad
    # It costs a step, which is told where it is skipped; NumPy has nothing to add to that.
    with np.errstate(all="raise"):
        after = objective.losses(scores, examples)
    assert not np.isfinite(after[1].mean())
    assert np.array_equal(after[[0, 2]], before[[0, 2]])


def test_only_a_choice_between_the_same_answers_is_calibrated():
    same, other = [example(1, 2), example(1, 2, gold=1)], [example(1, 2), example(2, 1)]
    plain = CandidateCrossEntropy()
    assert calibrated(plain, same) == CalibratedCrossEntropy(plain)
    assert calibrated(plain, other) is plain
    assert calibrated(CompletionNLL(), same) == CompletionNLL()
