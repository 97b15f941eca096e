"""The messages between driver and runtime: keys and scalars, never tensors.

A step is ``ask`` -> `Proposal` -> ``Runtime.score`` -> losses -> ``tell`` -> `Update` -> ``Runtime.apply``. Everything
here is plain data of a few hundred bytes, so it travels to another process or machine and into the journal unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DirectionKey:
    """Names one direction of a run: with the run's seed it determines every tensor of that direction.

    Attributes:
        window: Index of the window, which fixes V.
        step: Index of the step, which fixes U.
        index: Number of the direction within the step, ``0 .. directions - 1``.
    """

    window: int
    step: int
    index: int


@dataclass(frozen=True)
class Probe:
    """A point to score: the current weights plus ``sign * eps`` times a direction.

    ``sign`` is +1, -1, or 0 for the clean model (whose key is None).
    """

    key: DirectionKey | None
    sign: int
    eps: float


CLEAN = Probe(None, 0, 0.0)


@dataclass(frozen=True)
class Proposal:
    """The probes of one step, in the order in which their losses are expected back."""

    step: int
    window: int
    probes: tuple[Probe, ...]


@dataclass(frozen=True)
class Update:
    """How the weights change at the end of a step.

    Attributes:
        step: The step that ends.
        window: The window it belongs to.
        terms: Direction keys with their coefficients; empty for a skipped step.
        lr: Learning rate of matrices and vectors, in the convention of LOZO's official code (``B -= lr * c * U``).
        closes_window: True on the last step of a window: fold, then start the next window.
    """

    step: int
    window: int
    terms: tuple[tuple[DirectionKey, float], ...]
    lr: float
    closes_window: bool
