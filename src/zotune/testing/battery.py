"""What every preset must do, as checks that a test file parametrises over `zotune.presets.PRESETS`::

@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", PRESETS)
def test_preset(name, check):
    check(PRESETS[name], EmbeddedRuntime)
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from zotune.errors import NonFiniteLossError
from zotune.objectives import CandidateCrossEntropy, batch_losses
from zotune.optimizer import Method, Optimizer
from zotune.presets import Preset
from zotune.protocol import CLEAN, Proposal
from zotune.runtimes.base import Runtime
from zotune.testing import tiny
from zotune.testing.conformance import Factory

_STEPS = 60
_FAMILY = "llama"
_EXAMPLES = tiny.examples(4, seed=21)
"""The easy problem."""
_ROWS = [example.row for example in _EXAMPLES]


def quickened(method: Method) -> Method:
    """The method with steps that fit a tiny model and some dozens of steps, its windows short enough to close.

    A direction has about as much length as there are tuned parameters, times the rank for an unnormalised low-rank
    one, so the same reach wants a learning rate that much smaller.
    """
    if method.lora_rank is not None:
        return replace(method, lr=1e-2)
    spread = method.rank * method.scale**2 if method.family == "low-rank" else 1.0
    lr = 1e-2 if method.scope == "last-layers" else 1e-3
    return replace(method, lr=lr / spread, interval=min(method.interval, 20))


def train(runtime: Runtime, optimizer: Optimizer, first: int, last: int) -> list[float]:
    """Steps ``first`` to ``last - 1`` on the easy problem; their losses."""
    objective, losses = CandidateCrossEntropy(), []
    for step in range(first, last):
        proposal = optimizer.ask(step)
        scores = runtime.score(proposal.probes, _ROWS)
        told = batch_losses(objective, scores, _EXAMPLES)
        runtime.apply(optimizer.tell(proposal, told))
        losses.append(optimizer.loss(told))
    return losses


def check_description(preset: Preset, factory: Factory) -> None:
    """It says in one line what it is, and where it comes from."""
    assert preset.summary
    assert "\n" not in preset.summary
    assert any(str(year) in preset.citation for year in range(1990, 2100)), "a citation has a year"


def check_ask(preset: Preset, factory: Factory) -> None:
    """`ask` is pure: equal for equal steps in any order, other directions for other steps, windows of its interval."""
    optimizer, other = Optimizer(preset.method, 200), Optimizer(preset.method, 200)
    proposals = [optimizer.ask(step) for step in range(101)]
    assert [other.ask(step) for step in reversed(range(101))] == proposals[::-1]
    keys = [probe.key for proposal in proposals for probe in proposal.probes if probe.key is not None]
    assert len(set(keys)) == 101 * preset.method.directions
    for step, proposal in enumerate(proposals):
        assert proposal.step == step
        assert all(key.window == proposal.window for key in keys if key.step == step)


def check_tell(preset: Preset, factory: Factory) -> None:
    """`tell` is pure, and checks the step, the number of losses and that they are finite."""
    optimizer = Optimizer(preset.method, 200)
    proposal = optimizer.ask(3)
    losses = _distinct(proposal)
    update = optimizer.tell(proposal, losses)
    assert update == Optimizer(preset.method, 200).tell(proposal, losses)
    assert (update.step, update.window) == (3, proposal.window)
    assert len(update.terms) == preset.method.directions
    assert all(math.isfinite(coefficient) and coefficient for _, coefficient in update.terms)
    _refused(optimizer, proposal.step, losses[:-1], ValueError)
    for bad in (math.nan, math.inf, -math.inf):
        _refused(optimizer, proposal.step, [*losses[:-1], bad], NonFiniteLossError)
    foreign = replace(proposal, step=4)
    try:
        optimizer.tell(foreign, losses)
    except ValueError:
        return
    raise AssertionError("a proposal of another step was accepted")


def _distinct(proposal: Proposal) -> list[float]:
    """A loss per probe, no two equal, so that every estimator has an estimate."""
    return [0.5 + 0.1 * index for index in range(len(proposal.probes))]


def _refused(optimizer: Optimizer, step: int, losses: list[float], error: type[Exception]) -> None:
    try:
        optimizer.tell(optimizer.ask(step), losses)
    except error:
        return
    raise AssertionError(f"losses {losses} were accepted")


def check_learns(preset: Preset, factory: Factory) -> None:
    """On an easy problem the loss falls by a quarter within sixty steps."""
    method = quickened(preset.method)
    losses = train(factory(tiny.model(_FAMILY), method), Optimizer(method, _STEPS), 0, _STEPS)
    before, after = np.mean(losses[:5]), np.mean(losses[-5:])
    assert after < 0.75 * before, f"loss {before:.3f} before and {after:.3f} after {_STEPS} steps"


def check_skip(preset: Preset, factory: Factory) -> None:
    """A skipped step changes no score; the next step goes on as if it had been there."""
    method = quickened(preset.method)
    optimizer, runtime = Optimizer(method, _STEPS), factory(tiny.model(_FAMILY), method)
    train(runtime, optimizer, 0, 1)
    proposal = optimizer.ask(1)
    before = runtime.score([CLEAN], _ROWS)
    update = optimizer.skip(proposal)
    assert update.terms == ()
    assert update.closes_window == optimizer.tell(proposal, _distinct(proposal)).closes_window
    runtime.apply(update)
    after = runtime.score([CLEAN], _ROWS)
    # A window that closes is folded: the same weights, rounded once more.
    np.testing.assert_allclose(after, before, rtol=1e-5 if update.closes_window else 0)
    assert all(math.isfinite(loss) for loss in train(runtime, optimizer, 2, 4))


def check_resume(preset: Preset, factory: Factory) -> None:
    """Stopped in the middle and resumed by state, the rest of the run is the same bit for bit."""
    method = quickened(preset.method)
    optimizer, undisturbed = Optimizer(method, _STEPS), factory(tiny.model(_FAMILY), method)
    train(undisturbed, optimizer, 0, 7)
    state = undisturbed.state()
    resumed = factory(tiny.model(_FAMILY), method)
    resumed.load_state(state, optimizer.ask(7).window)
    # Past the end of a window.
    last = 7 + min(method.interval, 20) + 2
    assert train(resumed, optimizer, 7, last) == train(undisturbed, optimizer, 7, last)
    end = undisturbed.state()
    for name, tensor in resumed.state().items():
        assert torch.equal(tensor, end[name]), f"{name} differs after a resumed run"


CHECKS = (check_description, check_ask, check_tell, check_learns, check_skip, check_resume)
"""Each takes a preset and a factory of runtimes."""
