import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zotune.errors import ConfigError, NonFiniteLossError
from zotune.optimizer import Method, Optimizer
from zotune.presets import too_near
from zotune.protocol import CLEAN, DirectionKey, Probe, Proposal

METHODS = st.builds(
    Method,
    family=st.sampled_from(["low-rank", "dense"]),
    estimator=st.sampled_from(["two-point", "one-sided"]),
    interval=st.integers(1, 7),
    directions=st.integers(1, 4),
    eps=st.floats(1e-4, 1.0),
    lr=st.floats(1e-6, 1.0),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup_steps=st.integers(0, 10),
)
STEPS = 20


@given(method=METHODS, step=st.integers(0, STEPS - 1))
def test_ask_is_pure_and_names_distinct_directions_of_the_step(method: Method, step: int) -> None:
    optimizer = Optimizer(method, STEPS)
    proposal = optimizer.ask(step)
    optimizer.tell(proposal, [1.0] * len(proposal.probes))
    assert Optimizer(method, STEPS).ask(step) == optimizer.ask(step) == proposal
    keys = {probe.key for probe in proposal.probes if probe.key is not None}
    window = step // method.interval if method.family == "low-rank" else step
    assert keys == {DirectionKey(window, step, index) for index in range(method.directions)}
    assert (proposal.step, proposal.window) == (step, window)


@given(method=METHODS, step=st.integers(0, STEPS - 1), data=st.data())
def test_update_from_the_coefficients_alone_is_what_tell_gave(method: Method, step: int, data: st.DataObject) -> None:
    optimizer = Optimizer(method, STEPS)
    proposal = optimizer.ask(step)
    count = len(proposal.probes)
    losses = data.draw(st.lists(st.floats(0, 20), min_size=count, max_size=count))
    told = optimizer.tell(proposal, losses)
    assert optimizer.update(step, [coefficient for _, coefficient in told.terms]) == told
    assert [key.index for key, _ in told.terms] == list(range(method.directions))
    assert dataclasses.replace(told, terms=()) == optimizer.skip(proposal)


def test_two_point_step_by_hand() -> None:
    method = Method(eps=0.5, lr=0.1, interval=10, schedule="linear", directions=2)
    optimizer = Optimizer(method, steps=100)
    proposal = optimizer.ask(25)
    first, second = DirectionKey(2, 25, 0), DirectionKey(2, 25, 1)
    signed = [(first, 1), (first, -1), (second, 1), (second, -1)]
    assert proposal.probes == tuple(Probe(key, sign, 0.5) for key, sign in signed)
    update = optimizer.tell(proposal, [2.0, 1.0, 1.0, 4.0])
    assert update.terms == ((first, 0.5), (second, -1.5))
    assert update.lr == pytest.approx(0.075)
    assert (update.step, update.window, update.closes_window) == (25, 2, False)


def test_one_sided_step_by_hand() -> None:
    optimizer = Optimizer(Method(family="dense", estimator="one-sided", eps=0.5, lr=0.1), steps=10)
    proposal = optimizer.ask(4)
    key = DirectionKey(4, 4, 0)
    assert proposal.probes == (CLEAN, Probe(key, 1, 0.5))
    assert optimizer.tell(proposal, [1.0, 2.0]).terms == ((key, 2.0),)


def test_a_damped_step_probes_as_far_as_the_schedule_lets_it_go() -> None:
    method = Method(estimator="damped", eps=0.5, lr=0.1, schedule="linear", warmup_steps=2)
    optimizer = Optimizer(method, steps=12)
    distances = [optimizer.ask(step).probes[1].eps for step in (2, 4, 7)]
    assert distances == pytest.approx([0.5, 0.4, 0.25])
    # Nearer than half, rounding would outweigh it; and a learning rate of 0 still needs a distance.
    assert [optimizer.ask(step).probes[1].eps for step in (0, 1, 8, 11)] == [0.25] * 4
    assert optimizer.update(7, [1.0]).lr == pytest.approx(0.05)
    # A slope of 1 at the distance that was probed.
    assert [c for _, c in optimizer.tell(optimizer.ask(7), [1.0, 1.25]).terms] == [1.0]


@pytest.mark.parametrize(("eps", "bits", "told"), [(5e-4, 16, 1), (1e-3, 16, 0), (5e-4, 32, 0)])
def test_probes_that_16_bits_round_away_are_told(eps: float, bits: int, told: int) -> None:
    notices = too_near(Method(eps=eps), bits)
    assert len(notices) == told
    assert all("method.eps = 0.0005 is below 0.001" in notice for notice in notices)


def test_a_step_whose_directions_all_lose_the_same_has_no_estimate() -> None:
    optimizer = Optimizer(Method(estimator="standardised", directions=3), steps=2)
    with pytest.raises(NonFiniteLossError, match="step 1: coefficients"):
        optimizer.tell(optimizer.ask(1), [1.0, 2.0, 2.0, 2.0])


def test_a_spread_needs_two_directions() -> None:
    with pytest.raises(ConfigError, match=r"directions = 1: .* two directions or more"):
        Method(estimator="standardised")


@pytest.mark.parametrize("told", [True, False])
def test_a_window_closes_on_its_last_step_also_when_that_is_skipped(told: bool) -> None:
    optimizer = Optimizer(Method(interval=3), steps=9)
    proposals = [optimizer.ask(step) for step in range(9)]
    updates = [optimizer.tell(p, [1.0, 2.0]) if told else optimizer.skip(p) for p in proposals]
    assert [update.window for update in updates] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [update.closes_window for update in updates] == [False, False, True] * 3
    assert [len(update.terms) for update in updates] == [int(told)] * 9


def test_dense_steps_are_windows_of_their_own_that_need_no_closing() -> None:
    optimizer = Optimizer(Method(family="dense", interval=2), steps=4)
    assert [optimizer.ask(step).window for step in range(4)] == [0, 1, 2, 3]
    assert not any(optimizer.update(step, [1.0]).closes_window for step in range(4))


def test_the_first_window_after_a_skip_has_the_directions_it_would_have_had() -> None:
    optimizer = Optimizer(Method(interval=2), steps=4)
    before = optimizer.ask(2)
    optimizer.skip(optimizer.ask(1))
    assert optimizer.ask(2) == before


def test_a_proposal_of_another_step_or_method_is_refused() -> None:
    optimizer = Optimizer(Method(), steps=10)
    proposal = optimizer.ask(3)
    strangers = [
        dataclasses.replace(proposal, step=4),
        dataclasses.replace(proposal, window=1),
        Proposal(3, 0, proposal.probes[::-1]),
        Optimizer(Method(eps=0.5), steps=10).ask(3),
    ]
    for stranger in strangers:
        with pytest.raises(ValueError, match=f"step {stranger.step} was not asked"):
            optimizer.tell(stranger, [1.0, 2.0])


@pytest.mark.parametrize("losses", [[], [1.0], [1.0, 2.0, 3.0]])
def test_the_number_of_losses_must_be_that_of_the_probes(losses: list[float]) -> None:
    optimizer = Optimizer(Method(), steps=10)
    with pytest.raises(ValueError, match=f"got {len(losses)} losses for the 2 probes of step 3"):
        optimizer.tell(optimizer.ask(3), losses)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_loss_that_is_not_finite_is_refused_with_its_step(bad: float, place: int) -> None:
    optimizer = Optimizer(Method(), steps=10)
    losses = [1.0, 1.0]
    losses[place] = bad
    with pytest.raises(NonFiniteLossError, match="step 7") as error:
        optimizer.tell(optimizer.ask(7), losses)
    assert str(bad) in str(error.value)


@pytest.mark.parametrize("lr", [0.25, 0.0])
def test_the_learning_rate_that_a_journal_has_counts_and_not_the_schedules(lr: float) -> None:
    optimizer = Optimizer(Method(lr=0.1, schedule="linear"), steps=10)
    assert optimizer.update(5, [1.0], lr).lr == lr
    assert optimizer.update(5, [1.0]).lr == pytest.approx(0.05)


def test_update_refuses_another_number_of_coefficients() -> None:
    with pytest.raises(ValueError, match="argument"):
        Optimizer(Method(directions=3), steps=10).update(0, [1.0, 2.0])


def test_the_loss_for_people_is_the_mean_over_probes() -> None:
    assert Optimizer(Method(), steps=1).loss([1.0, 2.0, 6.0]) == 3.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"family": "dense", "momentum": 0.9}, "momentum = 0.9 needs low-rank directions.*lozo-m"),
        ({"scope": "last-layers", "momentum": 0.9}, "momentum = 0.9 would go on moving layers .* set momentum = 0, or"),
        ({"lora_rank": 8}, "LoRA.*dense.*mezo-lora"),
    ],
)
def test_a_method_without_meaning_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Method(**values)  # type: ignore[arg-type]


def test_the_scale_normalises_by_the_rank() -> None:
    assert Method(rank=4).scale == 1.0
    assert Method(rank=4, normalised=True).scale == 0.5


def test_a_coefficient_beyond_float32_is_no_estimate():
    optimizer, largest = Optimizer(Method(eps=0.5), steps=10), float(np.finfo(np.float32).max)
    assert optimizer.tell(optimizer.ask(0), [largest, 0.0]).terms[0][1] == largest
    for losses in ([math.nextafter(largest, math.inf), 0.0], [0.0, 4e38]):
        with pytest.raises(NonFiniteLossError, match="not finite in float32"):
            optimizer.tell(optimizer.ask(0), losses)
