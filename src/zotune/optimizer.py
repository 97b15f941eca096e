"""The optimizer: ask for probes, tell the losses. It holds no tensor and knows no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from zotune.errors import ConfigError, NonFiniteLossError
from zotune.estimators import ESTIMATORS, EstimatorName
from zotune.layout import Scope
from zotune.protocol import DirectionKey, Proposal, Update
from zotune.schedules import Schedule, factor

_LARGEST = (2 - 2**-23) * 2.0**127
"""The largest float32, in which runtimes hold what coefficients multiply."""

_NEAREST = 0.5
"""Share of ``eps`` that is left where it falls with the schedule: rounding does not fall with it."""


@dataclass(frozen=True)
class Method:
    """Everything that defines a zeroth-order method, as plain values.

    Attributes:
        family: ``low-rank`` directions ``U V^T`` or ``dense`` ones.
        distribution: Of the variates: ``normal`` or ``rademacher``.
        scope: What of the model is tuned; see `zotune.layout.Scope`.
        rank: Columns of U and V (low-rank).
        interval: Steps that share V, nu (low-rank).
        normalised: Whether directions are divided by ``sqrt(rank)`` (low-rank).
        estimator: One of `zotune.estimators.ESTIMATORS`.
        directions: Directions per step, q.
        calibrated: Whether what the model prefers to answer is fitted to every batch and taken off its loss; see
            `zotune.objectives.CalibratedCrossEntropy`.
        eps: Distance of a probe from the clean model.
        lr: Learning rate, in the convention of LOZO's official code (``B -= lr * c * U``).
        momentum: Beta of LOZO-M; 0 for plain SGD (low-rank).
        weight_decay: Decoupled: ``W -= lr * weight_decay * W`` where `zotune.layout.Site.decays`.
        schedule: One of `zotune.schedules.SCHEDULES`, after ``warmup_steps`` of linear rise.
        warmup_steps: See ``schedule``.
        lora_rank: Tune freshly added LoRA matrices of this rank on the query and value projections instead of the
            model's own weights.
        lora_alpha: LoRA's alpha: the adapter's output is multiplied by ``alpha / rank``.
    """

    family: Literal["low-rank", "dense"] = "low-rank"
    distribution: Literal["normal", "rademacher"] = "normal"
    scope: Scope = "all"
    rank: int = 2
    interval: int = 50
    normalised: bool = False
    estimator: EstimatorName = "two-point"
    directions: int = 1
    calibrated: bool = False
    eps: float = 1e-3
    lr: float = 1e-6
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    lora_rank: int | None = None
    lora_alpha: int = 16

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.family == "dense" and self.momentum:
            raise ConfigError(
                f"momentum = {self.momentum} needs low-rank directions: for dense ones it would take a second copy of "
                "the model. Use the preset lozo-m, or momentum = 0."
            )
        if self.momentum and self.scope == "last-layers":
            raise ConfigError(
                f"momentum = {self.momentum} would go on moving layers that are not at their turn; with scope = "
                "'last-layers' set momentum = 0, or another scope"
            )
        if self.lora_rank is not None and self.family != "dense":
            raise ConfigError("LoRA matrices are tuned with dense directions; use the preset mezo-lora")
        if self.estimator == "standardised" and self.directions < 2:
            raise ConfigError(
                f"directions = {self.directions}: the estimator 'standardised' divides by the spread of the losses of "
                "a step's directions; give two directions or more (fzoo has 8)"
            )

    @property
    def scale(self) -> float:
        """Factor of ``U V^T`` in a direction."""
        return 1 / math.sqrt(self.rank) if self.normalised else 1.0

    @property
    def probes(self) -> int:
        """Probes of every step."""
        return len(Optimizer(self, steps=1).ask(0).probes)


@dataclass(frozen=True)
class Optimizer:
    """Proposes the probes of each step and turns their losses into an update.

    Both directions are pure functions of the step, so a run can be resumed, replayed or replicated from its journal.

    Attributes:
        method: What to do.
        steps: Length of the run, which the schedule needs.
    """

    method: Method
    steps: int

    def ask(self, step: int) -> Proposal:
        """The probes of ``step``."""
        keys = self._keys(step)
        return Proposal(step, keys[0].window, ESTIMATORS[self.method.estimator].probes(keys, self._eps(step)))

    def tell(self, proposal: Proposal, losses: Sequence[float]) -> Update:
        """The update that follows from the losses of a proposal's probes.

        Raises:
            ValueError: The proposal is not one of this optimizer's, or the number of losses is not that of its probes.
            NonFiniteLossError: A loss is NaN or infinite, or a coefficient is not a finite float32; `skip` gives the
                update that leaves the weights alone.
        """
        if proposal != self.ask(proposal.step):
            raise ValueError(f"the proposal of step {proposal.step} was not asked from this optimizer")
        if len(losses) != len(proposal.probes):
            raise ValueError(f"got {len(losses)} losses for the {len(proposal.probes)} probes of step {proposal.step}")
        if not all(math.isfinite(loss) for loss in losses):
            raise NonFiniteLossError(f"step {proposal.step}: losses {[float(loss) for loss in losses]}")
        estimator, eps = ESTIMATORS[self.method.estimator], self._eps(proposal.step)
        coefficients = estimator.coefficients([float(x) for x in losses], eps)
        if not all(abs(coefficient) <= _LARGEST for coefficient in coefficients):
            raise NonFiniteLossError(f"step {proposal.step}: coefficients {coefficients} are not finite in float32")
        return self.update(proposal.step, coefficients)

    def skip(self, proposal: Proposal) -> Update:
        """The update of a step without an estimate: the weights stay, but a window still closes in its time."""
        return self.update(proposal.step, ())

    def update(self, step: int, coefficients: Sequence[float], lr: float | None = None) -> Update:
        """The update of ``step`` with known coefficients, as a journal holds them; none for a skipped step.

        Args:
            step: Its number, from 0.
            coefficients: One per direction, or none.
            lr: The learning rate that a journal has for the step; default: the schedule's.
        """
        keys = self._keys(step)
        terms = tuple(zip(keys, coefficients, strict=True)) if coefficients else ()
        if lr is None:
            lr = self.method.lr * self._factor(step)
        closes = self.method.family == "low-rank" and (step + 1) % self.method.interval == 0
        return Update(step, keys[0].window, terms, lr, closes)

    def _keys(self, step: int) -> list[DirectionKey]:
        window = step // self.method.interval if self.method.family == "low-rank" else step
        return [DirectionKey(window, step, index) for index in range(self.method.directions)]

    def _factor(self, step: int) -> float:
        return factor(self.method.schedule, step, self.steps, self.method.warmup_steps)

    def _eps(self, step: int) -> float:
        follows = ESTIMATORS[self.method.estimator].eps_follows_lr
        return self.method.eps * max(self._factor(step), _NEAREST) if follows else self.method.eps

    def loss(self, losses: Sequence[float]) -> float:
        """The step's loss for people: the mean over its probes."""
        return fmean(losses)
