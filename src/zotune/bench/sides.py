"""What is compared: zotune's runtimes and the official procedure, each on a model shape with random weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from zotune.bench import random_engine, random_rows, shapes, work
from zotune.bench.results import Case
from zotune.bench.steps import Setting, Stepper, Timed, method_of, official_of
from zotune.bench.turns import Phased
from zotune.models import chosen_device
from zotune.optimizer import Method
from zotune.rows import Example
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.engine.runtime import Work

OFFICIAL = "official"
SIDES = (OFFICIAL, "torch", "vllm", "vllm-compiled")
"""The official LOZO procedure, the embedded runtime, and vLLM without and with its compiler."""


class Steps(Phased, Protocol):
    """Takes steps; `zotune.bench.steps.Stepper` is zotune's.

    Attributes:
        setting: Model and batches; the batch size may change between two steps.
        device: Where the model is.
    """

    setting: Setting

    def step(self, number: int) -> float:
        """One step on the batch of this number; gives the loss."""
        ...

    def tokens(self, batch: Sequence[Example]) -> int:
        """Tokens that a step on this batch computes."""
        ...

    def flops(self, batch: Sequence[Example]) -> float:
        """Floating-point operations of the model in a step on this batch."""
        ...


class OfficialSteps:
    """The official LOZO step, which is one whole and folds nothing."""

    def __init__(self, setting: Setting, method: Method) -> None:
        self.setting, self.device = setting, setting.model.device
        self.timings: dict[str, float] = {}
        self._official = official_of(setting.model, method)

    def step(self, number: int) -> float:
        """See `Steps`."""
        return self._official.step(self.setting.batch(number))

    def fold(self) -> None:
        """Nothing: the weights were changed in place."""

    def tokens(self, batch: Sequence[Example]) -> int:
        """See `Steps`; padding counts."""
        return work.padded_tokens(batch)

    def flops(self, batch: Sequence[Example]) -> float:
        """What the step would take without padding, repeated prompts and unread logits."""
        rows = [example.row for example in batch]
        return work.step_flops(self.setting.model, rows, 2, normalised=False)


@dataclass(frozen=True)
class Side:
    """A side that is ready.

    Attributes:
        steps: What takes its steps.
        method: What is tuned, and how.
        startup_s: Seconds from nothing to ready.
    """

    steps: Steps
    method: Method
    startup_s: float


def start(case: Case, batches: Sequence[int]) -> Side:
    """Get a side ready.

    Args:
        case: With ``model`` (of `shapes.SHAPES`), ``runtime`` (of `SIDES`), ``dtype`` and ``threads``; and with
            ``rank``, ``scope`` and ``directions``, which the official procedure has not.
        batches: Batch sizes that it must be ready for.

    Raises:
        ModelError: There is not enough memory, or the shape cannot be tuned so.
        ConfigError: vLLM is not there, or not as it must be.
    """
    began = time.perf_counter()
    torch.set_num_threads(case["threads"])
    method = method_of(case.get("scope", "all"), case.get("rank", 2), case.get("directions", 1))
    device = chosen_device()
    engine = case["runtime"].startswith("vllm")
    network = shapes.network(case["model"], getattr(torch, case["dtype"]), "meta" if engine else device)
    setting = Setting(network, random_rows.dataset(network.config.vocab_size), max(batches))
    if case["runtime"] == OFFICIAL:
        steps: Steps = OfficialSteps(setting, method)
    else:
        runtime: Timed = _engine(case, setting, method, batches) if engine else EmbeddedRuntime(network, method)
        steps = Stepper(setting, method, runtime, device)
    return Side(steps, method, time.perf_counter() - began)


def _engine(case: Case, setting: Setting, method: Method, batches: Sequence[int]) -> Timed:
    works = [Work.of(setting.dataset, batch, method) for batch in batches]
    return random_engine.start(setting.model, method, works, compile=case["runtime"] == "vllm-compiled")
