"""Shares: which replica computes which units. They change who computes, never what."""

from __future__ import annotations

from collections.abc import Sequence

_WEIGHT = 0.3
"""Of the newest measurement in a replica's speed."""

_FORGETTING = 0.05
"""By which the speed of a replica without work nears the others' each time, so that it is tried again."""


def deal(costs: Sequence[float], speeds: Sequence[float]) -> list[list[int]]:
    """Give each unit to the replica that would be done with it first, the costliest units first.

    Args:
        costs: Of each unit, in anything that is proportional to time.
        speeds: Of each replica, in cost per second.

    Returns:
        The indices of each replica's units, ascending; a much slower replica may have none.
    """
    shares: list[list[int]] = [[] for _ in speeds]
    loads = [0.0] * len(speeds)
    for unit in sorted(range(len(costs)), key=lambda i: -costs[i]):
        first = min(range(len(speeds)), key=lambda r: (loads[r] + costs[unit]) / speeds[r])
        shares[first].append(unit)
        loads[first] += costs[unit]
    return [sorted(share) for share in shares]


def measured(speed: float | None, cost: float, seconds: float) -> float:
    """A replica's speed, once it has computed so much in so long."""
    newest = cost / max(seconds, 1e-6)
    return newest if speed is None else speed + _WEIGHT * (newest - speed)


def idle(speed: float, others: float) -> float:
    """A replica's speed, once it was given nothing; ``others`` is what the others have on average."""
    return speed + _FORGETTING * (others - speed)
