"""Real steps on real replicas, of several numbers in turn, and what a step costs there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

from zotune.bench import steps
from zotune.bench.cluster_simulation import Costs
from zotune.bench.steps import Setting, Stepper
from zotune.bench.turns import TURN
from zotune.config import ModelConfig, ReplicasConfig, RuntimeConfig
from zotune.optimizer import Method
from zotune.runtimes import precision
from zotune.runtimes.blueprint import Blueprint
from zotune.runtimes.engine import checkpoint_layout
from zotune.runtimes.replicas.cluster import Cluster, load_ray, start_local
from zotune.runtimes.replicas.member import Member, Traffic
from zotune.runtimes.replicas.runtime import RayRuntime
from zotune.runtimes.replicas.units import Unit

_CALLS = 20
_IDLE, _LOOKS = 2.0, 4
_IN_A_ROW = 2
"""Units that a replica is timed with: the first after a pause takes longer than those after it."""


@dataclass(frozen=True)
class Measured:
    """Steps of so many replicas on this machine.

    Attributes:
        replicas: How many.
        step_s: Median of a whole step.
        batches: Units of the step of each batch, and seconds of work for one of them while as many replicas work as a
            step keeps busy, so it holds what they share of the machine; in the order of the steps' length.
        overhead_s: Median of what of it is not a replica's work: driver and Ray.
        down_bytes: Of messages to replicas per step, rows that they have left out.
        up_bytes: Of messages from replicas per step.
        network_bytes: Through the loopback interface per step, headers and all that Ray adds counted, less what passes
            while no step is taken.
        start_s: Median time that starting one took.
    """

    replicas: int
    step_s: float
    batches: tuple[tuple[int, float], ...]
    overhead_s: float
    down_bytes: float
    up_bytes: float
    network_bytes: float
    start_s: float

    @property
    def usual(self) -> tuple[int, float]:
        """Units of the step of medium length, and seconds of one of them."""
        return self.batches[len(self.batches) // 2]


@dataclass(frozen=True)
class Findings:
    """All that was measured.

    Attributes:
        costs: Of a step on one replica.
        jitter: Relative standard deviation of its work.
        measured: One entry per number of replicas.
    """

    costs: Costs
    jitter: float
    measured: tuple[Measured, ...]


def measure(counts: Sequence[int], given: Mapping[str, Any], method: Method, cpus: int, repeats: int) -> Findings:
    """Time whole steps of each number of replicas in turn.

    Args:
        counts: Numbers of replicas; the costs are those of the first one.
        given: Of `zotune.bench.steps.prepare`.
        method: What to tune and how.
        cpus: Cores of a replica.
        repeats: Steps to time of each number.

    Raises:
        ConfigError: Ray is not installed.
        ZotuneError: The model cannot be loaded or tuned.
    """
    setting = steps.prepare(**given, load=checkpoint_layout.load)
    with ExitStack() as stack:
        # There is room for all sides at once: those whose turn it is not only sleep.
        start_local(cpus * sum(counts))
        stack.callback(load_ray().shutdown)
        sides = [_Side(count, setting, method, cpus, stack) for count in counts]
        idle = _loopback_rate()
        for start in range(0, repeats, TURN):
            for side in sides:
                side.turn(min(TURN, repeats - start), idle)
        return Findings(sides[0].costs(), sides[0].jitter(), tuple(side.measured() for side in sides))


class _Side:
    """So many replicas, and how long their steps took."""

    def __init__(self, replicas: int, setting: Setting, method: Method, cpus: int, stack: ExitStack) -> None:
        dtype = precision.name(setting.model.dtype)
        model = ModelConfig.model_validate({"path": setting.model.name_or_path, "dtype": dtype, "device": "cpu"})
        options = RuntimeConfig(threads=cpus, ray=ReplicasConfig(pin=True))
        self.runtime = RayRuntime(Cluster(options.ray, cpus, shards=1), Blueprint(model, method, 0, options), replicas)
        stack.enter_context(closing(self.runtime))
        self.stepper = Stepper(setting, method, self.runtime)
        self._taken: list[tuple[int, float, float]] = []
        self._per_token: list[float] = []
        self._network = 0.0
        self._traffic = Traffic()
        for batch in range(TURN):
            # Once the replicas hold the rows of these batches, no more than keys and scalars travels.
            self.stepper.step(batch)

    def turn(self, count: int, idle: float) -> None:
        """Take a few steps, one per batch, then units of each of these batches on all replicas at once."""
        began, passed, before = time.perf_counter(), _loopback(), replace(self.runtime.traffic)
        for batch in range(count):
            start, worked = time.perf_counter(), self.runtime.timings["work"]
            self.stepper.step(batch)
            taken = time.perf_counter() - start
            self._taken.append((batch, taken, self.runtime.timings["work"] - worked))
        self._network += _loopback() - passed - idle * (time.perf_counter() - began)
        self._traffic.down += self.runtime.traffic.down - before.down
        self._traffic.up += self.runtime.traffic.up - before.up
        for batch in range(count):
            self._per_token += self._at_once(batch)

    def _at_once(self, batch: int) -> list[float]:
        """Seconds of work per token of a batch while all replicas that a step keeps busy have a unit or two."""
        units, begin = self._cut(batch)
        members = list(self.runtime.team.members.values())
        for member in members:
            member.ask("nothing")
        shares = [units[first :: len(members)][:_IN_A_ROW] for first in range(len(members))]
        begun = [(member, share, begin(member, share)) for member, share in zip(members, shares, strict=True) if share]
        return [member.end(each)[0] / sum(unit.tokens for unit in share) for member, share, each in begun]

    def _cut(self, batch: int) -> tuple[list[Unit], Callable[[Member, list[Unit]], Any]]:
        rows = [example.row for example in self.stepper.setting.batch(batch)]
        return self.runtime.cut(self.stepper.optimizer.ask(0).probes, rows)

    def _batches(self) -> tuple[tuple[int, float], ...]:
        """Units of each batch's step, and seconds of one of them, the cheapest step first."""
        found = [self._cut(batch)[0] for batch in range(TURN)]
        found.sort(key=lambda units: sum(unit.tokens for unit in units))
        per_token = median(self._per_token)
        return tuple((len(units), per_token * sum(unit.tokens for unit in units) / len(units)) for units in found)

    def measured(self) -> Measured:
        """What the steps came to."""
        steps_taken = len(self._taken)
        return Measured(
            len(self.runtime.team.members),
            step_s=median(taken for _, taken, _ in self._taken),
            batches=self._batches(),
            overhead_s=median(taken - work for _, taken, work in self._taken),
            down_bytes=self._traffic.down / steps_taken,
            up_bytes=self._traffic.up / steps_taken,
            network_bytes=self._network / steps_taken,
            start_s=median(member.started for member in self.runtime.team.members.values()),
        )

    def costs(self) -> Costs:
        """Of a step on one replica; of the update alone by asking for nothing after it."""
        member = next(iter(self.runtime.team.members.values()))
        updating, calling = [], []
        for _ in range(TURN):
            self.stepper.step(0)
            updating.append(member.end(member.begin("nothing"))[0])
        for _ in range(_CALLS):
            began = time.perf_counter()
            member.ask("nothing")
            calling.append(time.perf_counter() - began)
        found, call = self.measured(), median(calling)
        return Costs(found.usual[1], median(updating), call, max(0.0, found.overhead_s - call), found.start_s)

    def jitter(self) -> float:
        """Relative standard deviation of the work on one batch."""
        by_batch = [[work for other, _, work in self._taken if other == batch] for batch in range(TURN)]
        return mean(pstdev(works) / mean(works) for works in by_batch if works)


def _loopback() -> int:
    """Bytes that have passed the loopback interface, over which processes of one machine talk to each other."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[0])
    return 0


def _loopback_rate() -> float:
    """Bytes per second while no step is taken: the least of several looks, because processes that start are noisy."""
    looks = []
    for _ in range(_LOOKS):
        before = _loopback()
        time.sleep(_IDLE)
        looks.append((_loopback() - before) / _IDLE)
    return min(looks)
