"""When a run ends early: what its losses so far say of the best step, and of going on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from zotune.errors import StopRun
from zotune.evaluate import Metrics
from zotune.figures import counted
from zotune.journal import Entry


def best(evaluations: Mapping[int, Metrics]) -> int | None:
    """The step of the lowest validation loss, the earliest of equals; None if no loss is finite.

    Args:
        evaluations: By finished steps.
    """
    finite = [step for step in sorted(evaluations) if math.isfinite(evaluations[step].loss)]
    return min(finite, key=lambda step: evaluations[step].loss, default=None)


def stop_if_stalled(evaluations: Mapping[int, Metrics], patience: int | None, min_delta: float) -> None:
    """End the run once the validation loss has not improved in ``patience`` evaluations in a row.

    An evaluation is an improvement if its loss is lower than that of the last improvement by more than ``min_delta``.
    It is a pure function of the evaluations on record, so a run that was killed stops where it would have.

    Raises:
        StopRun: It is time; never if ``patience`` is None.
    """
    lowest, waited = math.inf, 0
    for step in sorted(evaluations):
        if evaluations[step].loss < lowest - min_delta:
            lowest, waited = evaluations[step].loss, 0
        else:
            waited += 1
    if patience is not None and waited >= patience:
        by = f" by more than {min_delta:g}" if min_delta else ""
        raise StopRun(f"the validation loss has not fallen{by} in {counted(waited, 'evaluation')} (train.patience)")


def has_diverged(entries: Sequence[Entry], allowed: int) -> bool:
    """Whether the last ``allowed`` steps had no estimate, because a loss was not finite or all were the same."""
    recent = entries[-allowed:]
    return len(recent) == allowed and not any(entry.coefficients for entry in recent)


def is_stuck(entries: Sequence[Entry], steps: int) -> bool:
    """Whether for just so many steps no direction has changed the loss, which is not zero."""
    flat = [bool(e.coefficients) and not any(e.coefficients) and any(e.losses) for e in entries[-steps - 1 :]]
    return len(flat) >= steps and all(flat[-steps:]) and not (len(flat) > steps and flat[0])
