"""``zotune bench parity``: losses, coefficients and trajectories of every runtime against the dense oracle's.

All sides of a comparison score the same batches under the same directions. What a case leaves is its losses, or its
coefficients, as they came; `zotune.bench.report.parity` compares them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from zotune import presets
from zotune.bench import cases, steps
from zotune.bench.parity_sides import Side, causes, losses, prepared, require_model, started
from zotune.bench.results import Case, Result, Results
from zotune.bench.runtimes import RUNTIMES
from zotune.data import BatchOrder
from zotune.errors import ConfigError, unknown
from zotune.optimizer import Method, Optimizer
from zotune.protocol import CLEAN, DirectionKey, Probe
from zotune.testing.baselines.first_order import mean_loss
from zotune.testing.reference import OracleRuntime

PARTS = ("runtimes", "causes", "eps", "trajectories")
"""What can be measured: each runtime against the oracle, error by its cause, by probe distance, over whole runs."""

SIDES = ("oracle", *RUNTIMES)
"""What can be compared; the oracle is what the others are compared with, the slow part of a report."""

EPS = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Probe distances of the part ``eps``."""


@dataclass(frozen=True)
class Comparison:
    """What is to be compared.

    Attributes:
        models: Of `zotune.bench.parity_sides.DEMO`, tiny families, hub ids and folders.
        data: As for `zotune.bench.step`.
        parts: Of `PARTS`.
        sides: Of `SIDES`.
        dtypes: Of the model; the oracle is always float32.
        scope: What is tuned.
        probes: Directions, each on a batch of its own.
        eps: Distance of a probe, where it is not swept.
        batch_size: Examples per step.
        presets: Of trajectories.
        steps: Of a trajectory.
        lr: Of trajectories; it stays as it is.
        seeds: Trajectories per side, with noise and batches of the seeds 0, 1, ...
    """

    models: Sequence[str] = ("tiny:opt", "tiny:llama")
    data: Path | None = None
    parts: Sequence[str] = PARTS
    sides: Sequence[str] = ("oracle", "torch", "vllm")
    dtypes: Sequence[str] = ("float32", "bfloat16")
    scope: str = "all"
    probes: int = 200
    eps: float = 1e-3
    batch_size: int = 16
    presets: Sequence[str] = ("lozo",)
    steps: int = 300
    lr: float = 3e-5
    seeds: int = 1

    def check(self) -> None:
        """Refuse what has no meaning.

        Raises:
            ConfigError: A name is unknown or a number out of range.
        """
        for kind, names, known in (("part", self.parts, PARTS), ("side", self.sides, SIDES)):
            for name in names:
                if name not in known:
                    raise ConfigError(unknown(kind, name, known))
        for name in self.presets:
            presets.get(name)
        for dtype in self.dtypes:
            steps.check(dtype, dtype, self.scope, [self.batch_size, self.probes, self.steps, self.seeds])
        if not (self.eps > 0 and self.lr > 0):
            raise ConfigError(f"eps and lr must be positive, got {self.eps:g} and {self.lr:g}")

    def cases(self) -> list[Case]:
        """Every case, in order, each once: parts may share some."""
        of = dict(zip(PARTS, (self._runtimes, self._causes, self._eps, self._trajectories), strict=True))
        made = [case for model in self.models for part in self.parts for case in of[part](model)]
        return [case for number, case in enumerate(made) if case not in made[:number]]

    def _sides(self) -> Iterator[Side]:
        for name in self.sides:
            yield from (Side(name, dtype) for dtype in (("float32",) if name == "oracle" else self.dtypes))

    def _runtimes(self, model: str) -> Iterator[Case]:
        yield from (self._probing(model, side) for side in self._sides())

    def _causes(self, model: str) -> Iterator[Case]:
        for cause in (each for dtype in self.dtypes for each in causes(dtype)):
            yield from (self._probing(model, side) for side in (cause.before, cause.after))

    def _eps(self, model: str) -> Iterator[Case]:
        # A slope has no distance.
        yield replace(self, eps=0.0)._probing(model, Side("autograd"))
        for eps in EPS:
            yield from (replace(self, eps=eps)._probing(model, Side(dtype=dtype)) for dtype in self.dtypes)

    def _probing(self, model: str, side: Side) -> Case:
        return self._common("probes", model) | asdict(side) | {"probes": self.probes}

    def _trajectories(self, model: str) -> Iterator[Case]:
        for preset in self.presets:
            low_rank = presets.get(preset).method.family == "low-rank"
            for side in self._sides():
                if low_rank or side.runtime != "vllm-compiled":
                    run = {"preset": preset, "steps": self.steps, "lr": self.lr}
                    common = self._common("trajectory", model) | asdict(side) | run
                    yield from (common | {"seed": seed} for seed in range(self.seeds))

    def _common(self, what: str, model: str) -> dict[str, Any]:
        data = self.data.name if self.data is not None else None
        return {
            "what": what,
            "model": model,
            "data": data,
            "scope": self.scope,
            "eps": self.eps,
            "batch_size": self.batch_size,
        }


def parity(
    comparison: Comparison,
    folder: Path,
    *,
    console: Console,
    threads: int | None = None,
    minutes: float = float("inf"),
    retry: bool = False,
) -> list[Result]:
    """Measure those cases of a comparison that have no result yet.

    Args:
        comparison: What to compare.
        folder: Where results are and go.
        console: Told of every case in one line.
        threads: CPU threads.
        minutes: Begin no case after so long.
        retry: Measure again what failed.

    Raises:
        ConfigError: See `Comparison.check`.
        ModelError: A model is not there; nothing has been measured then.
    """
    comparison.check()
    for name in comparison.models:
        require_model(name)

    def measure(case: Case) -> Mapping[str, Any]:
        if case["what"] == "trajectory":
            return _trajectory(case, comparison.data)
        return (_slopes if case["runtime"] == "autograd" else _probes)(case, comparison.data)

    with steps.threads_set(threads):
        results = Results(folder, "parity")
        return cases.run(results, comparison.cases(), measure, console=console, minutes=minutes, retry=retry)


def _method(case: Case, preset: str = "lozo") -> Method:
    return replace(presets.get(preset).method, scope=cast("Any", case["scope"]), eps=case["eps"])


def _key(number: int) -> DirectionKey:
    # All of the first window: a runtime scores the directions of one window at a time.
    return DirectionKey(0, number, 0)


def _probes(case: Case, data: Path | None) -> dict[str, Any]:
    """Clean, plus and minus losses of every direction on its batch."""
    side, eps = Side.of(case), case["eps"]
    with prepared(case, data) as setting, started(side, setting, _method(case)) as runtime:
        found = []
        for number in range(case["probes"]):
            probes = (CLEAN, *(Probe(_key(number), sign, eps) for sign in (1, -1)))
            found.append(losses(side, runtime, setting, probes, setting.batch(number)))
    return dict(zip(("clean", "plus", "minus"), map(list, zip(*found, strict=True)), strict=True))


def _slopes(case: Case, data: Path | None) -> dict[str, Any]:
    """The derivative of the clean loss along every direction, by backpropagation: what coefficients estimate."""
    found = []
    with prepared(case, data) as setting:
        reference = OracleRuntime(setting.model.cpu(), _method(case))
        model, weights = reference.oracle.model, reference.oracle.weights
        parameters = [model.get_parameter(site.name) for site in reference.layout.sites]
        for number in range(case["probes"]):
            loss = mean_loss(model, setting.dataset.objective, setting.batch(number))
            gradients = torch.autograd.grad(loss, parameters)
            pairs = zip(gradients, weights, reference.directions.dense(_key(number)), strict=True)
            # Where a parameter is stored transposed, the site is a view of it.
            parts = [torch.sum((g if w.is_contiguous() else g.T) * d, dtype=torch.float64) for g, w, d in pairs]
            found.append(float(sum(parts)))
    return {"slopes": found}


def _trajectory(case: Case, data: Path | None) -> dict[str, Any]:
    """The mean loss of every step of a run, and the coefficients of them all."""
    side, seed = Side.of(case), case["seed"]
    method = replace(_method(case, case["preset"]), lr=case["lr"])
    optimizer = Optimizer(method, case["steps"])
    figures: dict[str, Any] = {"losses": [], "coefficients": []}
    with prepared(case, data) as setting, started(side, setting, method, seed) as runtime:
        examples = setting.dataset.train
        order = BatchOrder(len(examples), case["batch_size"], seed)
        for step in range(case["steps"]):
            proposal = optimizer.ask(step)
            batch = [examples[index] for index in order.indices(step)]
            found = losses(side, runtime, setting, proposal.probes, batch)
            update = optimizer.tell(proposal, found)
            runtime.apply(update)
            figures["losses"].append(optimizer.loss(found))
            figures["coefficients"] += [coefficient for _, coefficient in update.terms]
    return figures
