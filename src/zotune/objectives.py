"""Objectives: from the scores of a batch's candidates to one loss per example."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from zotune.rows import Example


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
        means, starts, counts = _length_normalised(scores, examples)
        with np.errstate(invalid="ignore", divide="ignore"):
            highest = np.maximum.reduceat(means, starts, axis=1)
            shifted = np.exp(means - np.repeat(highest, counts, axis=1))
            total = highest + np.log(np.add.reduceat(shifted, starts, axis=1))
            gold = starts + np.array([example.gold for example in examples])
            return (total - means[:, gold]).astype(np.float32)


@dataclass(frozen=True)
class CompletionNLL:
    """Fine-tuning on text: mean negative log-likelihood per scored token of the gold candidate.

    An example weighs the same whatever its length, as for MeZO's generation-like tasks (Malladi et al. 2023).
    """

    normalised: bool = True

    def losses(self, scores: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
        """See `Objective.losses`."""
        means, starts, _ = _length_normalised(scores, examples)
        return (-means[:, starts + np.array([example.gold for example in examples])]).astype(np.float32)


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


def _length_normalised(scores: np.ndarray, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean log-probability per scored token, float64, with each example's first column and number of columns."""
    counts = np.array([len(example.row.candidates) for example in examples], dtype=np.int64)
    lengths = np.array([len(candidate.scored) for example in examples for candidate in example.row.candidates])
    if not len(examples) or scores.ndim != 2 or scores.shape[1] != len(lengths):
        raise ValueError(f"{len(examples)} examples have {len(lengths)} candidates; got scores of shape {scores.shape}")
    return scores.astype(np.float64) / lengths, np.cumsum(counts) - counts, counts
