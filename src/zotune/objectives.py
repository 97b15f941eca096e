"""Objectives: from the scores of a batch's candidates to one loss per example."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from zotune.rows import Example

PRIOR = 1.5
"""Standard deviation of the bias that `CalibratedCrossEntropy` fits, in nats."""

_ITERATIONS = 50
"""Of Newton's method, which moves at most a nat each time: enough for any bias that a model has."""


class Objective(Protocol):
    """Turns log-likelihoods into losses.

    Attributes:
        normalised: Whether scores must be true log-probabilities, or only differences within a row count and the
            objective passes them through a softmax over the candidates.
    """

    @property
    def normalised(self) -> bool:
        """See the class."""
        ...

    def losses(self, scores: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
        """One loss per probe and example.

        Args:
            scores: float32 ``(probes, total candidates)``, as `zotune.runtimes.base.Runtime.score` returns them.
            examples: The batch, in the order of the scores.

        Returns:
            float32 ``(probes, len(examples))``.
        """
        ...


@dataclass(frozen=True)
class CandidateCrossEntropy:
    """Classification: cross-entropy over the candidates of an example.

    With ``m_j`` the log-likelihood of candidate ``j`` divided by its number of scored tokens, the loss is
    ``log sum_j exp(m_j) - m_gold`` (Malladi et al. 2023, MeZO, and its official code).

    Attributes:
        normalised: False only where the vocabulary's normaliser cancels exactly, that is where every candidate of every
            example to come is one token; `for_examples` finds out.
    """

    normalised: bool = True

    @classmethod
    def for_examples(cls, examples: Iterable[Example]) -> CandidateCrossEntropy:
        """The objective for these examples and no others."""
        return cls(normalised=not all(example.row.single_token for example in examples))

    def losses(self, scores: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
        """See `Objective.losses`; NaN where a score of the example is NaN, infinite where the gold one is minus it."""
        return _cross_entropy(*_length_normalised(scores, examples), _gold(examples)).astype(np.float32)


@dataclass(frozen=True)
class CalibratedCrossEntropy:
    """Classification, with what a model prefers to answer whatever it is asked fitted to every batch and taken off.

    With mean log-likelihoods ``m_i`` of K answers that are the same for all n examples, the batch's loss is

        min_b  mean_i CE(m_i - b) + |b|^2 / (2 PRIOR^2 n)

    the most probable b under a normal prior. A direction in weight space mostly moves what all examples have in common,
    and that is most of a zeroth-order estimate's noise; b absorbs it, and the prior still draws b to zero in the long
    run. Calibration by a batch is Zhou et al. 2024, "Batch Calibration"; as an objective of training it is ours.
    """

    plain: CandidateCrossEntropy

    @property
    def normalised(self) -> bool:
        """As without."""
        return self.plain.normalised

    def losses(self, scores: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
        """See `Objective.losses`; the penalty of b is part of every example's loss."""
        means, starts, counts = _length_normalised(scores, examples)
        gold, count = _gold(examples), len(examples)
        with np.errstate(invalid="ignore"):
            bias = _fitted_bias(means.reshape(len(scores), count, -1), gold)
        penalty = (bias**2).sum(1, keepdims=True) / (2 * PRIOR**2 * count)
        losses = _cross_entropy(means - np.tile(bias, count), starts, counts, gold)
        return (losses + penalty).astype(np.float32)


def calibrated(objective: Objective, examples: Sequence[Example]) -> Objective:
    """The objective with its answers calibrated, if it chooses between answers that are the same for all examples."""
    answers = {tuple(candidate.tokens for candidate in example.row.candidates) for example in examples}
    if not isinstance(objective, CandidateCrossEntropy) or len(answers) != 1:
        return objective
    return CalibratedCrossEntropy(objective)


def _fitted_bias(answers: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """The b of `CalibratedCrossEntropy`, ``(probes, K)``, by Newton's method from zero.

    Args:
        answers: ``(probes, examples, K)``.
        gold: Index of the right answer, ``(examples,)``.
    """
    probes, examples, count = answers.shape
    right, ridge = np.eye(count)[gold].mean(0), 1 / (PRIOR**2 * examples)
    bias = np.zeros((probes, count))
    for _ in range(_ITERATIONS):
        odds = answers - bias[:, None]
        odds = np.exp(odds - odds.max(2, keepdims=True))
        p = odds / odds.sum(2, keepdims=True)
        gradient = right - p.mean(1) + ridge * bias
        curvature = np.eye(count) * (p.mean(1)[:, None] + ridge) - np.einsum("pni,pnj->pij", p, p) / examples
        # Far from the optimum the loss is about linear, and a full step would go anywhere.
        bias -= np.clip(np.linalg.solve(curvature, gradient[..., None])[..., 0], -1, 1)
    return bias


@dataclass(frozen=True)
class CompletionNLL:
    """Fine-tuning on text: mean negative log-likelihood per scored token of the gold candidate.

    An example weighs the same whatever its length, as for MeZO's generation-like tasks (Malladi et al. 2023).
    """

    normalised: bool = True

    def losses(self, scores: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
        """See `Objective.losses`."""
        means, starts, _ = _length_normalised(scores, examples)
        return (-means[:, starts + _gold(examples)]).astype(np.float32)


def batch_losses(objective: Objective, scores: np.ndarray, examples: Sequence[Example]) -> list[float]:
    """The loss of every probe on a batch, the mean over its examples in double precision; see `Objective.losses`."""
    means: list[float] = objective.losses(scores, examples).mean(axis=1, dtype=np.float64).tolist()
    return means


def predictions(scores: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
    """The most likely candidate of each example, by length-normalised log-likelihood.

    Args:
        scores: float32 ``(probes, total candidates)``, as `zotune.runtimes.base.Runtime.score` returns them.
        examples: In the order of the scores.

    Returns:
        int64 ``(probes, len(examples))``: the first of the best candidates' indices within the example; -1, which is
        never right, where a score is NaN.
    """
    means, starts, counts = _length_normalised(scores, examples)
    places = np.arange(means.shape[1]) - np.repeat(starts, counts)
    best = means == np.repeat(np.maximum.reduceat(means, starts, axis=1), counts, axis=1)
    beyond = means.shape[1]
    first = np.minimum.reduceat(np.where(best, places, beyond), starts, axis=1)
    return np.where(first == beyond, -1, first).astype(np.int64)


def _gold(examples: Sequence[Example]) -> np.ndarray:
    """Index of the right candidate of every example."""
    return np.array([example.gold for example in examples])


def _cross_entropy(means: np.ndarray, starts: np.ndarray, counts: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Cross-entropy over each example's candidates, float64 ``(probes, examples)``; see `_length_normalised`."""
    with np.errstate(invalid="ignore"):
        highest = np.maximum.reduceat(means, starts, axis=1)
        shifted = np.exp(means - np.repeat(highest, counts, axis=1))
        total = highest + np.log(np.add.reduceat(shifted, starts, axis=1))
        return total - means[:, starts + gold]


def _length_normalised(scores: np.ndarray, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean log-probability per scored token, float64, with each example's first column and number of columns."""
    counts = np.array([len(example.row.candidates) for example in examples])
    lengths = np.array([len(candidate.scored) for example in examples for candidate in example.row.candidates])
    if not len(examples) or scores.ndim != 2 or scores.shape[1] != len(lengths):
        raise ValueError(f"{len(examples)} examples have {len(lengths)} candidates; got scores of shape {scores.shape}")
    return scores.astype(np.float64) / lengths, np.cumsum(counts) - counts, counts
