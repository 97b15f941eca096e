"""Update rules: from coefficients to a change of the factors, in float32.

The accumulated update of a low-rank site is ``B V^T`` with V fixed for the window, and a direction is ``U V^T``, so
gradients, momentum and learning rates all act on ``(out, r)`` factors. Factors of all sites lie in one flat buffer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from zotune.directions import LowRankDirections


class Sgd:
    """``B <- B - lr g`` with ``g = sum_i c_i U_i`` (LOZO, official code's convention)."""

    def step(self, factors: Tensor, gradient: Tensor, lr: float) -> None:
        """Change ``factors`` in place; ``gradient`` has the same shape and may be overwritten."""
        factors.add_(gradient, alpha=-lr)

    def turn(self, directions: LowRankDirections, window: int) -> None:
        """Carry the rule's own state from ``window`` into the next one; there is none here."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must keep."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""


class Momentum:
    """LOZO-M: ``N <- b N + (1 - b) g``, ``B <- B - lr N`` (Chen et al. 2025, section 5).

    When V changes, N is projected into the new window: ``N <- N (V_old^T V_new) / n`` with n rows of V, the
    least-squares projection of ``N V_old^T`` with ``V_new^T V_new`` replaced by its expectation ``n I``.
    """

    def __init__(self, beta: float, size: int, device: torch.device | str = "cpu") -> None:
        self.beta = beta
        self.average = torch.zeros(size, device=device)

    def step(self, factors: Tensor, gradient: Tensor, lr: float) -> None:
        """Change ``factors`` in place by the running average, ``gradient`` included."""
        self.average.mul_(self.beta).add_(gradient, alpha=1 - self.beta)
        factors.add_(self.average, alpha=-lr)

    def turn(self, directions: LowRankDirections, window: int) -> None:
        """Project the average of every matrix onto the next window's V."""
        views = directions.factors.views(self.average)
        olds, news = directions.window(window), directions.window(window + 1)
        for average, old, new in zip(views, olds, news, strict=True):
            if old is not None and new is not None:
                average.copy_(average @ (old.T @ new) / (len(new) * directions.scale**2))

    def state(self) -> dict[str, Tensor]:
        """The running average."""
        return {"momentum": self.average}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore the running average."""
        self.average.copy_(state["momentum"])


Rule = Sgd | Momentum

_LARGEST = torch.finfo(torch.float32).max


def combine(terms: Iterable[tuple[Tensor, float]]) -> Tensor:
    """``sum_i c_i U_i``, one or more, added in the order given; overwrites the first, and keeps none of the others."""
    terms = iter(terms)
    first, coefficient = next(terms)
    total = first.mul_(coefficient)
    for direction, coefficient in terms:
        total.add_(direction, alpha=coefficient)
        # It may be as large as a weight, and would be there while the next one is drawn.
        del direction
    return total


def in_float32(value: float) -> float:
    """The nearest number that operations on float32 take; what is beyond has diverged, and the loss is to tell."""
    return min(max(value, -_LARGEST), _LARGEST)
