"""Evaluation: loss and accuracy of the clean model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zotune.objectives import Objective, predictions
from zotune.protocol import CLEAN
from zotune.rows import Example
from zotune.runtimes.base import Runtime


@dataclass(frozen=True)
class Metrics:
    """How good a model is on some examples.

    Attributes:
        loss: Mean of the objective.
        accuracy: Share of examples whose gold candidate is the likeliest; None where there is nothing to choose from.
        examples: How many there were.
    """

    loss: float
    accuracy: float | None
    examples: int


def evaluate(runtime: Runtime, examples: Sequence[Example], objective: Objective) -> Metrics:
    """Score the clean model, as it is now, on these examples."""
    scores = runtime.score([CLEAN], [example.row for example in examples], normalised=objective.normalised)
    loss = float(objective.losses(scores, examples).mean(dtype=np.float64))
    accuracy = None
    if any(len(example.row.candidates) > 1 for example in examples):
        right = predictions(scores, examples)[0] == [example.gold for example in examples]
        accuracy = float(right.mean())
    return Metrics(loss, accuracy, len(examples))
