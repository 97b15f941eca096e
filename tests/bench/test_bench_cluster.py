"""The simulator of ``zotune bench cluster``: limits that can be computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from zotune import cli
from zotune.bench.cluster_check import Measured
from zotune.bench.cluster_report import ClusterReport
from zotune.bench.cluster_simulation import Conditions, Costs, simulate, step_seconds
from zotune.errors import ConfigError

COSTS = Costs(unit=0.1, common=0.02, call=0.001, driver=0.002, start=60.0)
CALM = Conditions(latency=0.003, jitter=0.0, failures=0.0)


@pytest.mark.parametrize(("replicas", "share"), [(1, 8), (2, 4), (3, 3), (8, 1), (100, 1)])
def test_without_jitter_and_losses_a_step_is_what_its_largest_share_costs(replicas: int, share: int) -> None:
    last_asked = min(replicas, {1: 1, 2: 2, 3: 2, 8: 8, 100: 8}[replicas])
    expected = 0.002 + 0.003 + share * 0.1 + 0.02 + last_asked * 0.0005 + 0.0005
    assert step_seconds(COSTS, CALM, 8, replicas) == pytest.approx(expected)


@given(seed=st.integers(0, 100), replicas=st.integers(1, 64))
def test_jitter_makes_a_step_wait_for_the_slowest(seed: int, replicas: int) -> None:
    calm = step_seconds(COSTS, CALM, replicas, replicas)
    jittery = step_seconds(COSTS, replace(CALM, jitter=0.2), replicas, replicas, seed)
    assert jittery > 0.95 * calm
    if replicas >= 8:
        assert jittery > 1.1 * calm


def test_losses_cost_what_is_missing_meanwhile() -> None:
    """Forty replicas, of which on average two are being replaced, work at the speed of 38 or a little less."""
    losses = replace(CALM, failures=0.05 * 3600 / COSTS.start)
    found = step_seconds(COSTS, losses, 1520, 40)
    assert 1.0 < found / step_seconds(COSTS, CALM, 1520, 38) < 1.06


def test_efficiency_is_against_one_replica_and_the_driver_bounds_it() -> None:
    found = simulate(COSTS, CALM, 8, (1, 2, 4096))
    assert found[0].fixed_efficiency == found[0].grown_efficiency == pytest.approx(1)
    assert 0.9 < found[1].fixed_efficiency < 1
    assert found[2].grown_s > 4096 * COSTS.call
    assert found[2].fixed_s < 2 * found[1].fixed_s


def test_nothing_to_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        step_seconds(COSTS, CALM, 0, 1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--unit-ms", "0"], "and a unit above 0"),
        (["--unit-ms", "inf"], "got the costs and conditions unit inf"),
        (["--unit-ms", "70", "--start-s", "inf"], "start inf"),
        (["--unit-ms", "70", "--jitter", "inf"], "jitter inf"),
        (["--unit-ms", "70", "--failures", "1e300"], "failures 1e+300"),
        (["--check", ""], "got the numbers of replicas []; give one at least"),
        (["--check", "1,0"], "got the numbers of replicas [1, 0]"),
    ],
)
def test_what_cannot_be_simulated_is_refused(words: list[str], told: str) -> None:
    refused = CliRunner().invoke(cli.app, ["bench", "cluster", *words])
    assert refused.exit_code == 2, refused.exception
    assert told in refused.stderr


def test_what_a_machine_allows_counts_the_replicas_that_have_a_unit() -> None:
    """Two units on four replicas of two cores keep two of them busy; four units keep all four, two to a core."""

    def at_best(units: int, unit_s: dict[int, float]) -> list[float]:
        batches = {n: ((1, 9.0), (units, seconds), (9, 9.0)) for n, seconds in unit_s.items()}
        measured = tuple(Measured(n, 1.0, each, 0.0, 0.0, 0.0, 0.0, 0.0) for n, each in batches.items())
        report = ClusterReport(units, units, COSTS, CALM, (), measured, (), {})
        return [report.at_best(each) for each in measured]

    assert at_best(2, {1: 1.0, 2: 1.25, 4: 1.25}) == [1.0, 1.6, 1.6]
    assert at_best(4, {1: 1.0, 2: 1.25, 4: 2.5}) == [1.0, 1.6, 1.6]
