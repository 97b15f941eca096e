"""Estimators: from the losses of a step's probes to one coefficient per direction.

All are pure functions. ``probes`` lists what to score; ``slopes`` and ``coefficients`` turn the losses, in that order,
into the loss's slope along every direction, and into the projected gradients ``c`` whose mean direction
``1/q sum c_i u_i`` estimates the gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import pstdev
from typing import Literal

from zotune.protocol import CLEAN, DirectionKey, Probe

EstimatorName = Literal["two-point", "one-sided", "standardised", "damped"]


class Estimator(ABC):
    """What every estimator offers.

    Attributes:
        eps_follows_lr: Whether the probe distance falls with the learning rate's schedule, as far as to half.
    """

    eps_follows_lr = False

    @abstractmethod
    def probes(self, keys: Sequence[DirectionKey], eps: float) -> tuple[Probe, ...]:
        """The points to score for these directions."""

    @abstractmethod
    def slopes(self, losses: Sequence[float], eps: float) -> tuple[float, ...]:
        """The loss's derivative along each direction, as its probes see it."""

    def coefficients(self, losses: Sequence[float], eps: float) -> tuple[float, ...]:
        """One coefficient per direction, each already divided by the number of directions: the slopes, as they are."""
        slopes = self.slopes(losses, eps)
        return tuple(slope / len(slopes) for slope in slopes)


class TwoPoint(Estimator):
    """Central difference ``c = (L(+eps) - L(-eps)) / (2 eps)`` (Spall 1992, SPSA); two forwards per direction."""

    def probes(self, keys: Sequence[DirectionKey], eps: float) -> tuple[Probe, ...]:
        """Plus and minus of each direction, side by side."""
        return tuple(Probe(key, sign, eps) for key in keys for sign in (1, -1))

    def slopes(self, losses: Sequence[float], eps: float) -> tuple[float, ...]:
        """Differences of neighbours."""
        return tuple((plus - minus) / (2 * eps) for plus, minus in zip(losses[::2], losses[1::2], strict=True))


class OneSided(Estimator):
    """Forward difference ``c = (L(+eps) - L(0)) / eps`` with one clean score shared by all directions."""

    def probes(self, keys: Sequence[DirectionKey], eps: float) -> tuple[Probe, ...]:
        """The clean model, then plus of each direction."""
        return (CLEAN, *(Probe(key, 1, eps) for key in keys))

    def slopes(self, losses: Sequence[float], eps: float) -> tuple[float, ...]:
        """Differences from the clean loss."""
        clean, *shifted = losses
        return tuple((loss - clean) / eps for loss in shifted)


class Standardised(OneSided):
    """FZOO: forward differences over the spread of the losses, ``c_i = (L(u_i) - L(0)) / std_j L(u_j)``.

    The step adapts to how rough the loss is around the point, as normalised SGD's does; ``eps`` cancels but for
    curvature. Needs two directions or more; where all their losses are equal there is no estimate.
    """

    def coefficients(self, losses: Sequence[float], eps: float) -> tuple[float, ...]:
        """Differences from the clean loss in units of the shifted losses' standard deviation; NaN where that is 0."""
        clean, *shifted = losses
        spread = pstdev(shifted)
        if not spread:
            return (math.nan,) * len(shifted)
        return tuple((loss - clean) / spread / len(shifted) for loss in shifted)


class Damped(OneSided):
    """1.5-SPSA: forward differences, large ones damped: ``c_i / max(1, |c_i| ** 0.1)``; eps follows the lr."""

    eps_follows_lr = True

    def coefficients(self, losses: Sequence[float], eps: float) -> tuple[float, ...]:
        """The slopes, each damped."""
        slopes = self.slopes(losses, eps)
        return tuple(slope / max(1.0, abs(slope) ** 0.1) / len(slopes) for slope in slopes)


ESTIMATORS: dict[EstimatorName, Estimator] = {
    "two-point": TwoPoint(),
    "one-sided": OneSided(),
    "standardised": Standardised(),
    "damped": Damped(),
}
