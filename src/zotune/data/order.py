"""The order in which steps take the examples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class BatchOrder:
    """Which examples each step takes: a pure function of the step.

    Examples are taken in shuffled epochs, without replacement within an epoch. Every batch has ``batch_size`` entries:
    one that crosses the end of an epoch takes the rest from the next epoch, so nothing is dropped and no batch is
    smaller. A batch size above the number of examples spans several epochs in the same way.

    Attributes:
        n_examples: At least 1.
        batch_size: At least 1.
        seed: Of the shuffling; not negative.
    """

    n_examples: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if min(self.n_examples, self.batch_size) < 1:
            raise ValueError(f"need at least one example and a batch size of at least one; got {self}")

    def indices(self, step: int) -> tuple[int, ...]:
        """The indices of the examples of one step, counted from 0.

        Raises:
            ValueError: ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"steps are counted from 0; got {step}")
        epoch, place = divmod(step * self.batch_size, self.n_examples)
        found: tuple[int, ...] = ()
        while (due := self.batch_size - len(found)) > 0:
            found += _epoch(self.n_examples, self.seed, epoch)[place : place + due]
            epoch, place = epoch + 1, 0
        return found


@lru_cache(maxsize=4)
def _epoch(n_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    # Sorted raw words, not Generator.permutation: numpy keeps only the former the same in all its versions.
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n_examples)
    return tuple(np.argsort(words, kind="stable").tolist())
