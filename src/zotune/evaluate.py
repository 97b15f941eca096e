"""Evaluation of the clean model: its loss, and what it chooses or writes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from zotune import answers
from zotune.objectives import Objective, batch_losses, predictions
from zotune.protocol import CLEAN
from zotune.rows import Example
from zotune.runtimes.base import Runtime

Decode = Callable[[Sequence[int]], str]

MAX_NEW_TOKENS = 50
"""Tokens that an answer may have (Malladi et al. 2023, MeZO)."""


@dataclass(frozen=True)
class Metrics:
    """How good a model is on some examples.

    Attributes:
        loss: Mean of the objective.
        accuracy: Share of examples whose gold candidate is the likeliest; None where there is nothing to choose from.
        examples: How many there were.
        exact_match: Share of examples whose written answer is right; None where nothing is written.
        f1: Mean F1 of the written answers; None where nothing is written. See `zotune.answers` for both.
    """

    loss: float
    accuracy: float | None
    examples: int
    exact_match: float | None = None
    f1: float | None = None

    @property
    def shares(self) -> dict[str, float]:
        """Those of accuracy, exact match and F1 that there are, by their names for people."""
        named = {"accuracy": self.accuracy, "exact match": self.exact_match, "F1": self.f1}
        return {name: share for name, share in named.items() if share is not None}


@dataclass(frozen=True)
class Evaluation:
    """Metrics, and what they come from.

    Attributes:
        metrics: The means.
        predicted: For each example the index of the candidate that was chosen (-1 where a score is NaN), or the text
            that was written; empty where nothing is predicted.
        right: Whether each of those is right; a text by exact match.
    """

    metrics: Metrics
    predicted: tuple[int | str, ...] = ()
    right: tuple[bool, ...] = ()


def evaluate(
    runtime: Runtime,
    examples: Sequence[Example],
    objective: Objective,
    decode: Decode | None = None,
    stop: Collection[int] = (),
) -> Evaluation:
    """Judge the clean model, as it is now, on these examples.

    Examples with candidates to choose from have an accuracy. Examples with answers are judged by what the model writes
    on from their prompts, if ``decode`` is given: greedily, up to the end of the line or 50 tokens.

    Args:
        runtime: What holds the model.
        examples: At least one.
        objective: What turns scores into losses.
        decode: The text of token ids, special tokens left out.
        stop: Token ids that end an answer.
    """
    scores = runtime.score([CLEAN], [example.row for example in examples], normalised=objective.normalised)
    metrics = Metrics(batch_losses(objective, scores, examples)[0], None, len(examples))
    if decode is not None and any(example.answers for example in examples):
        return _written(metrics, examples, _write(runtime, examples, decode, stop))
    if any(len(example.row.candidates) > 1 for example in examples):
        return _chosen(metrics, examples, predictions(scores, examples)[0])
    return Evaluation(metrics)


def _chosen(metrics: Metrics, examples: Sequence[Example], predicted: np.ndarray) -> Evaluation:
    right = predicted == [example.gold for example in examples]
    metrics = Metrics(metrics.loss, float(right.mean()), metrics.examples)
    return Evaluation(metrics, tuple(predicted.tolist()), tuple(right.tolist()))


def _write(runtime: Runtime, examples: Sequence[Example], decode: Decode, stop: Collection[int]) -> tuple[str, ...]:
    """What the model writes for each example, on one line."""
    prompts = [example.prompt for example in examples]
    written = runtime.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, stop=stop)
    # A line break may also be part of a token that does not stop.
    return tuple(decode(tokens).partition("\n")[0].strip() for tokens in written)


def _written(metrics: Metrics, examples: Sequence[Example], texts: tuple[str, ...]) -> Evaluation:
    pairs = [(text, example.answers) for text, example in zip(texts, examples, strict=True)]
    right = tuple(answers.exact_match(*pair) for pair in pairs)
    f1 = sum(answers.f1(*pair) for pair in pairs) / len(pairs)
    metrics = Metrics(metrics.loss, None, metrics.examples, exact_match=sum(right) / len(right), f1=f1)
    return Evaluation(metrics, texts, right)
