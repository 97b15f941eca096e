"""Any method on any model: scores are the dense oracle's, and neither scoring nor a stop on the way leaves a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, reject, settings
from hypothesis import strategies as st

from zotune.errors import ConfigError
from zotune.optimizer import Method, Optimizer
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.testing import conformance, tiny
from zotune.testing.reference import OracleRuntime

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
FIELDS: dict[str, list[Any]] = {
    "family": ["low-rank", "low-rank", "dense"],
    "distribution": ["normal", "rademacher"],
    "scope": ["all", "last-layers", "linear", "last-layers"],
    "rank": [1, 2, 5],
    "interval": [1, 2, 3, 50],
    "normalised": [False, True],
    "estimator": ["two-point", "one-sided", "standardised", "damped"],
    "directions": [1, 2, 3],
    "momentum": [0.0, 0.0, 0.9],
    "weight_decay": [0.0, 30.0],
    "schedule": ["constant", "linear", "cosine"],
    "warmup_steps": [0, 2],
}


@settings(max_examples=15, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
@given(st.data())
def test_any_method_on_any_model(draw: st.DataObject) -> None:
    def any_of(values: Any) -> Any:
        return draw.draw(st.sampled_from(values))

    try:
        method = Method(eps=1e-2, lr=3e-3, **{name: any_of(values) for name, values in FIELDS.items()})
    except ConfigError:
        reject()
    family, fold, stop = any_of(tiny.FAMILIES), any_of(["stochastic", "master"]), any_of(range(STEPS))
    runtime, silent, resumed = (
        EmbeddedRuntime(tiny.model(family), method, fold=fold, max_tokens=any_of([16, 100, 16384])) for _ in range(3)
    )
    reference = OracleRuntime(tiny.model(family), method, sites=runtime.layout.sites)
    optimizer, following = Optimizer(method, STEPS), [runtime, silent, reference]
    for step in range(STEPS):
        proposal, rows = optimizer.ask(step), tiny.rows(any_of(["single", "mixed", "multi"]), 2, seed=step)
        conformance.assert_close(runtime.score(proposal.probes, rows), reference.score(proposal.probes, rows), 2e-4)
        coefficients = [0.5 - index for index in range(method.directions)]
        update = optimizer.update(step, coefficients) if any_of([True, True, False]) else optimizer.skip(proposal)
        for each in following:
            each.apply(update)
        if step == stop:
            resumed.load_state(runtime.state(), optimizer.ask(step + 1).window)
            following.append(resumed)
    for other in (silent, resumed):
        assert all(torch.equal(tensor, other.state()[name]) for name, tensor in runtime.state().items())
    weights = runtime.tuned()
    for name, expected in reference.oracle.model.named_parameters():
        torch.testing.assert_close(weights[name], expected.data, atol=1e-5, rtol=1e-4)
