"""Steps of many replicas, simulated from what one step costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from zotune.errors import ConfigError

_STEPS = 400
"""Simulated steps of each number of replicas; their mean is within a few percent of that of many."""

_LARGEST = 1e4
"""Seconds, or losses per hour: less than what a step's Poisson distributions can be drawn for."""


@dataclass(frozen=True)
class Costs:
    """What a step costs, in seconds.

    Attributes:
        unit: Of work for one unit on one replica.
        common: Of work on every replica, whatever its share: the update, and what it draws.
        call: Of the driver's for each replica: a question and its answer.
        driver: Of the driver's besides.
        start: Until a replica that was lost is replaced.
    """

    unit: float
    common: float
    call: float
    driver: float
    start: float


@dataclass(frozen=True)
class Conditions:
    """Under which steps are simulated.

    Attributes:
        latency: Round trip on the network, seconds.
        jitter: Relative standard deviation of a replica's work from step to step.
        failures: Losses of each replica per hour.
    """

    latency: float = 5e-4
    jitter: float = 0.05
    failures: float = 0.01


@dataclass(frozen=True)
class Simulated:
    """Mean steps of so many replicas, in seconds.

    Attributes:
        replicas: How many.
        fixed_s: A step of as many units as were asked for.
        fixed_efficiency: Directions per second and replica, against one replica's.
        grown_s: A step of as many units for each replica, by a larger batch: more directions would also make the
            update larger.
        grown_efficiency: The same for these.
    """

    replicas: int
    fixed_s: float
    fixed_efficiency: float
    grown_s: float
    grown_efficiency: float


def simulate(
    costs: Costs, conditions: Conditions, units: int, replicas: Sequence[int], seed: int = 0
) -> tuple[Simulated, ...]:
    """What steps would take on other numbers of replicas.

    Args:
        costs: Of a step.
        conditions: Of the cluster.
        units: Of a step.
        replicas: Numbers of them.
        seed: Of the simulation.

    Raises:
        ConfigError: A cost or a condition is out of range, or a unit costs nothing.
    """
    _require_sensible(costs, conditions)
    alone = step_seconds(costs, conditions, units, 1, seed)
    found = []
    for count in replicas:
        fixed = step_seconds(costs, conditions, units, count, seed)
        grown = step_seconds(costs, conditions, units * count, count, seed)
        found.append(Simulated(count, fixed, alone / fixed / count, grown, alone / grown))
    return tuple(found)


def _require_sensible(costs: Costs, conditions: Conditions) -> None:
    values = {**asdict(costs), **asdict(conditions)}
    if not costs.unit or not all(0 <= value <= _LARGEST for value in values.values()):
        told = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise ConfigError(
            f"got the costs and conditions {told}; allowed are 0 to {_LARGEST:g}, in seconds and failures per hour, "
            "and a unit above 0"
        )


def step_seconds(costs: Costs, conditions: Conditions, units: int, replicas: int, seed: int = 0) -> float:
    """Mean seconds of a step.

    The driver asks one replica after the other and takes their answers as they come; replicas that are lost while they
    work are noticed at once, and the others share their units. Losses are a Poisson process, so the number of replicas
    that are being replaced at any moment has a Poisson distribution (the queue M/G/infinity).

    Args:
        costs: Of a step.
        conditions: Of the cluster.
        units: Of a step.
        replicas: How many there should be.
        seed: Of the simulation.
    """
    if min(units, replicas) < 1:
        raise ConfigError(f"units and replicas must be at least 1, got {units} and {replicas}")
    draw = np.random.default_rng(seed)
    rate = replicas * conditions.failures / 3600
    missing = draw.poisson(rate * costs.start, _STEPS)
    there = np.maximum(replicas - missing, 1)[:, None]
    index = np.arange(replicas)
    shares = np.where(index < there, units // there + (index < units % there), 0)
    work = shares * costs.unit + costs.common * (index < there)
    sigma = np.sqrt(np.log1p(conditions.jitter**2))
    work = work * draw.lognormal(-(sigma**2) / 2, sigma, work.shape)
    # Half of a call's cost is on the way down and half on the way up.
    asked = (np.minimum(index + 1, there)) * costs.call / 2
    done = np.where(shares > 0, asked + conditions.latency + work + costs.call / 2, 0.0).max(axis=1)
    busy = np.minimum(there[:, 0], units) * costs.call + conditions.latency
    step = costs.driver + np.maximum(done, busy)
    lost = draw.poisson(rate * step)
    again = np.minimum(lost, units) * (
        -(-shares.max(axis=1) // np.maximum(there[:, 0] - 1, 1)) * costs.unit + costs.call
    )
    # Where all are missing, the step waits for the first one, half of its start on average.
    alone = np.where((missing >= replicas) | ((lost > 0) & (replicas == 1)), costs.start / 2, 0.0)
    return float(np.mean(step + again + alone))
