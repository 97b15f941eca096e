"""What a long benchmark is to measure: every combination of a few values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from zotune.bench import random_engine, shapes, steps
from zotune.bench.results import Case
from zotune.bench.sides import OFFICIAL, SIDES
from zotune.errors import ConfigError, unknown


@dataclass(frozen=True)
class Plan:
    """Every combination of these is a case, but that the official procedure is measured once per model and batch size.

    Attributes:
        models: Of `zotune.bench.shapes.SHAPES`.
        runtimes: Of `zotune.bench.sides.SIDES`.
        batches: Examples per step.
        directions: Two-point directions per step.
        ranks: Columns of U and V.
        scopes: Of `zotune.layout.Scope`.
        dtype: Of the models; ``auto``: bfloat16 where the device multiplies it natively, else float32.
        threads: CPU threads; None: PyTorch's.

    Raises:
        ConfigError: A name is unknown, a number is not positive, there are none, or vLLM is not installed.
    """

    models: Sequence[str]
    runtimes: Sequence[str]
    batches: Sequence[int]
    directions: Sequence[int] = (1,)
    ranks: Sequence[int] = (2,)
    scopes: Sequence[str] = ("all",)
    dtype: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for name in ("models", "runtimes", "batches", "directions", "ranks", "scopes"):
            if not getattr(self, name):
                raise ConfigError(f"there are no {name} to measure; give at least one")
        for model in self.models:
            shapes.check(model)
        for runtime in self.runtimes:
            if runtime not in SIDES:
                raise ConfigError(unknown("runtime", runtime, SIDES))
        dtype = steps.resolved(self.dtype)
        for scope in self.scopes:
            steps.check(dtype, dtype, scope, [*self.batches, *self.directions, *self.ranks, self.threads or 1])
        if any(runtime.startswith("vllm") for runtime in self.runtimes):
            random_engine.require()

    def cases(self) -> list[Case]:
        """Side by side those that differ in their batch size alone, and the official ones before those of zotune."""
        common = {"dtype": steps.resolved(self.dtype), "threads": self.threads or torch.get_num_threads()}
        return [
            {"model": model, "runtime": runtime, **common, **choice, "batch_size": batch}
            for model in self.models
            for runtime in sorted(set(self.runtimes), key=SIDES.index)
            for choice in self._choices(runtime)
            for batch in sorted(set(self.batches))
        ]

    def _choices(self, runtime: str) -> list[Case]:
        """What of a method there is to choose; the official procedure has its own."""
        if runtime == OFFICIAL:
            return [{}]
        chosen = product(self.scopes, self.ranks, self.directions)
        return [{"scope": scope, "rank": rank, "directions": count} for scope, rank, count in chosen]


def cost(case: Case) -> float:
    """About how long a case takes, compared with others: what a step computes."""
    # A padded row per candidate, and passes over all weights.
    rows = 6 if case["runtime"] == OFFICIAL else case["directions"]
    return float(shapes.parameters(case["model"])) * rows * case["batch_size"]
