"""Estimators: from the losses of a step's probes to one coefficient per direction.

Each is a pair of pure functions. ``probes`` lists what to score; ``coefficients`` turns the losses, in that order,
into the projected gradients ``c`` whose mean direction ``1/q sum c_i u_i`` estimates the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from zotune.protocol import CLEAN, DirectionKey, Probe


class Estimator(Protocol):
    """What every estimator offers."""

    def probes(self, keys: Sequence[DirectionKey], eps: float) -> tuple[Probe, ...]:
        """The points to score for these directions."""
        ...

    def coefficients(self, losses: Sequence[float], eps: float) -> tuple[float, ...]:
        """One coefficient per direction, each already divided by the number of directions."""
        ...


class TwoPoint:
    """Central difference ``c = (L(+eps) - L(-eps)) / (2 eps)`` (Spall 1992, SPSA); two forwards per direction."""

    def probes(self, keys: Sequence[DirectionKey], eps: float) -> tuple[Probe, ...]:
        """Plus and minus of each direction, side by side."""
        return tuple(Probe(key, sign, eps) for key in keys for sign in (1, -1))

    def coefficients(self, losses: Sequence[float], eps: float) -> tuple[float, ...]:
        """Differences of neighbours."""
        n = len(losses) // 2
        return tuple((losses[2 * i] - losses[2 * i + 1]) / (2 * eps) / n for i in range(n))


class OneSided:
    """Forward difference ``c = (L(+eps) - L(0)) / eps`` with one clean score shared by all directions."""

    def probes(self, keys: Sequence[DirectionKey], eps: float) -> tuple[Probe, ...]:
        """The clean model, then plus of each direction."""
        return (CLEAN, *(Probe(key, 1, eps) for key in keys))

    def coefficients(self, losses: Sequence[float], eps: float) -> tuple[float, ...]:
        """Differences from the clean loss."""
        clean, *shifted = losses
        return tuple((loss - clean) / eps / len(shifted) for loss in shifted)


ESTIMATORS: dict[str, Estimator] = {"two-point": TwoPoint(), "one-sided": OneSided()}
