"""Learning-rate schedules: the factor on the learning rate at a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]

SCHEDULES: dict[Schedule, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def factor(schedule: Schedule, step: int, steps: int, warmup_steps: int) -> float:
    """Factor in ``[0, 1]`` at ``step`` of ``steps``: a linear rise over the warm-up, then the schedule to the end.

    As in transformers' ``get_scheduler``, the first warm-up step has factor 0 and the first step after it factor 1.
    """
    if step < warmup_steps:
        return step / warmup_steps
    return SCHEDULES[schedule]((step - warmup_steps) / max(1, steps - warmup_steps))
