"""Several sides in turn: some steps of one follow some of the others, so that a slow minute is slow for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import Protocol

import torch

from zotune.bench import work

TURN = 3
"""Steps in a row of either side: in a run, too, a step follows a step and not another program."""

_FOLDS = 3


class Phased(Protocol):
    """A side whose runtime's clocks say where its time goes, and whose windows close."""

    device: torch.device

    @property
    def timings(self) -> dict[str, float]:
        """Seconds that the runtime spent so far, by phase."""
        ...

    def fold(self) -> None:
        """Close the window, where there is one."""
        ...


@dataclass(frozen=True)
class Timing:
    """What `alternate` found.

    Attributes:
        seconds: Of each step of each side.
        phases: Mean seconds of a step of each phased side by phase; ``other`` is what its clocks do not see.
        folds: Seconds in which each phased side closes a window.
        peak: Of the best matrix product measured in between, operations per second.
    """

    seconds: dict[str, list[float]]
    phases: dict[str, dict[str, float]]
    folds: dict[str, float]
    peak: float


def alternate(
    sides: Mapping[str, Callable[[int], object]],
    phased: Mapping[str, Phased],
    repeats: int,
    device: torch.device,
    product: torch.dtype,
) -> Timing:
    """Warm all sides up, then time them in turn, a few steps at a time, on the same batches.

    Args:
        sides: A step of each, on the batch of a number.
        phased: Those of the sides that are, by the same names.
        repeats: Steps of each.
        device: Of all sides.
        product: Dtype of the matrix products that the peak is measured with.
    """
    for step in sides.values():
        step(0)
    before = {name: dict(side.timings) for name, side in phased.items()}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    peaks = []
    for start in range(1, repeats + 1, TURN):
        turn = range(start, min(start + TURN, repeats + 1))
        for name, step in sides.items():
            taken[name] += [seconds(partial(step, number), device) for number in turn]
        # In the same minutes as the steps, because on a shared machine the peak moves as much as they do.
        peaks.append(work.matmul_peak(product, device))
    phases = {}
    for name, side in phased.items():
        spent = {phase: (after - before[name][phase]) / repeats for phase, after in side.timings.items()}
        phases[name] = spent | {"other": mean(taken[name]) - sum(spent.values())}
    folds = {name: fold_seconds(side) for name, side in phased.items()}
    return Timing(taken, phases, folds, max(peaks))


def fold_seconds(side: Phased) -> float:
    """How long closing a window takes, the median of three; on a GPU once kernels for it were compiled."""
    for _ in range(2 if side.device.type == "cuda" else 0):
        side.fold()
    return median(seconds(side.fold, side.device) for _ in range(_FOLDS))


def seconds(act: Callable[[], object], device: torch.device) -> float:
    """How long something takes, on the device too."""
    start = work.clock(device)
    act()
    return work.clock(device) - start
