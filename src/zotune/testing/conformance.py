"""What every runtime must do, as checks that compare it with the dense oracle.

A runtime's test file parametrises them::

    @pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
    def test_my_runtime(check):
        check(conformance.Case(MyRuntime, "llama", conformance.METHODS["all"]))

Everything is float32 unless said otherwise; a failed check is an `AssertionError`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from zotune.layout import Site
from zotune.objectives import CandidateCrossEntropy, batch_losses
from zotune.optimizer import Method, Optimizer
from zotune.protocol import CLEAN, DirectionKey, Probe, Update
from zotune.rows import Row
from zotune.runtimes.base import Runtime, foreseeing
from zotune.testing import oracle, tiny
from zotune.testing.reference import OracleRuntime

TOLERANCE = 1e-4
"""Largest relative difference to the oracle's float32 scores."""

METHODS: dict[str, Method] = {
    "all": Method(scope="all", eps=1e-2, lr=1e-3, interval=3),
    "linear": Method(scope="linear", eps=1e-2, lr=1e-3, interval=3),
    "last-layers": Method(scope="last-layers", eps=1e-2, lr=1e-2, interval=3, weight_decay=2.0),
    "rank-one": Method(rank=1, eps=1e-2, lr=1e-3, interval=3),
    "rademacher": Method(distribution="rademacher", rank=3, normalised=True, eps=1e-2, lr=1e-3, interval=1),
    "momentum": Method(momentum=0.9, eps=1e-2, lr=1e-3, interval=3, rank=4, normalised=True),
    "decay": Method(weight_decay=2.0, eps=1e-2, lr=1e-2, interval=3),
    "dense": Method(family="dense", eps=1e-2, lr=1e-3, weight_decay=2.0),
    "dense-linear": Method(family="dense", scope="linear", eps=1e-2, lr=1e-3),
    "dense-last-layers": Method(family="dense", scope="last-layers", eps=1e-2, lr=1e-3, weight_decay=2.0),
    "lora": Method(family="dense", eps=0.2, lr=1e-2, lora_rank=4),
}
"""Methods that between them use everything a runtime must know of a method, with steps large enough to be seen."""


class Factory(Protocol):
    """Makes the runtime under test around a tiny model, which it may change."""

    def __call__(self, model: Any, method: Method, *, seed: int = 0, max_tokens: int = 16384) -> Runtime:
        """A runtime in window 0."""
        ...


@dataclass(frozen=True)
class Case:
    """One runtime on one tiny model with one method.

    Attributes:
        factory: Of the runtime under test.
        family: One of `zotune.testing.tiny.FAMILIES`.
        method: Usually one of `METHODS`.
        head_size: Width of the model's attention heads.
    """

    factory: Factory
    family: str
    method: Method
    head_size: int = 8

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """A fresh model."""
        return tiny.model(self.family, dtype, head_size=self.head_size)

    def runtime(self, **options: Any) -> Runtime:
        """The runtime under test around a fresh model."""
        return self.factory(self.model(), self.method, **options)

    def plain(self, seed: int = 0) -> Any:
        """The model as the oracle has it, with LoRA matrices of a run seed if the method tunes them."""
        model = self.model()
        if self.method.lora_rank is not None:
            from zotune.runtimes.embedded import lora

            lora.add(model, self.method.lora_rank, self.method.lora_alpha, seed)
        return model

    def sites(self) -> tuple[Site, ...]:
        """What the method's scope means for the model."""
        found = oracle.sites(self.plain(), self.method.scope)
        return found if self.method.lora_rank is None else tuple(site for site in found if "lora_" in site.name)

    def both(self, **options: Any) -> tuple[Runtime, OracleRuntime]:
        """The runtime under test and the oracle on the same sites."""
        runtime, seed = self.runtime(**options), options.get("seed", 0)
        reference = OracleRuntime(self.plain(seed), self.method, seed=seed, sites=runtime.layout.sites)
        return runtime, reference

    def probes(self, step: int = 0, directions: int = 1) -> tuple[Probe, ...]:
        """The clean model, then plus and minus of each direction of a step."""
        keys = [DirectionKey(self.window(step), step, index) for index in range(directions)]
        return (CLEAN, *(Probe(key, sign, self.method.eps) for key in keys for sign in (1, -1)))

    def window(self, step: int) -> int:
        """The window of a step."""
        return step // self.method.interval if self.method.family == "low-rank" else step

    def updates(self, steps: int) -> list[Update]:
        """Updates of the first steps with two directions each and coefficients far from zero."""
        optimizer = Optimizer(replace(self.method, directions=2), steps)
        return [optimizer.update(step, (1.5 - step, 0.5 + step)) for step in range(steps)]


def assert_close(scores: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Scores must have the oracle's shape, be float32 and lie within the relative tolerance."""
    assert scores.dtype == np.float32, f"scores are {scores.dtype}, not float32"
    np.testing.assert_allclose(scores, expected, rtol=tolerance)


def check_sites(case: Case) -> None:
    """The layout holds each parameter of the scope once, by its canonical name, matrices as ``(out, in)``."""
    assert set(case.runtime().layout.sites) == set(case.sites())


def check_fingerprint(case: Case) -> None:
    """Equal models have equal fingerprints; one changed weight gives another."""
    changed = case.model()
    with torch.no_grad():
        list(changed.parameters())[-1].add_(0.1)
    first = case.runtime().fingerprint
    assert case.runtime().fingerprint == first
    assert case.factory(changed, case.method).fingerprint != first


def check_probes(case: Case) -> None:
    """Clean, plus and minus of three directions, rows of every kind, and a run seed of its own."""
    runtime, reference = case.both(seed=7)
    rows, probes = tiny.rows("mixed", 7, seed=1), case.probes(directions=3)
    expected = reference.score(probes, rows)
    assert np.abs(expected[1:] - expected[0]).max(1).min() > 20 * TOLERANCE * np.abs(expected).max()
    assert_close(runtime.score(probes, rows), expected)


def check_rows(case: Case) -> None:
    """Single tokens, branches, one row alone, one token alone, the same prompt twice: as the oracle scores them."""
    runtime, reference = case.both()
    twice = tiny.rows("multi", 2, seed=4)
    batches: list[Sequence[Row]] = [
        tiny.rows("single", 5, seed=2),
        tiny.rows("multi", 5, seed=3),
        tiny.rows("multi", 1, seed=4),
        tiny.rows("single", 1, seed=5, longest=1),
        (*twice, *twice),
    ]
    for rows in batches:
        assert_close(runtime.score(case.probes(), rows), reference.score(case.probes(), rows))
    # As many tokens as the tiny models have heads or key heads: a per-head norm must not take one for the other.
    for length in (2, 4):
        row = Row(tuple(range(10, 10 + length)), tiny.rows("single", 1)[0].candidates)
        assert_close(runtime.score(case.probes()[1:2], [row]), reference.score(case.probes()[1:2], [row]))


def check_order(case: Case) -> None:
    """A probe's scores depend neither on the other probes nor on their order, nor a row's on the other rows."""
    runtime = case.runtime()
    rows, probes = tiny.rows("mixed", 5, seed=1), case.probes(directions=2)
    scores = runtime.score(probes, rows)
    assert_close(runtime.score(probes[::-1], rows)[::-1], scores)
    assert_close(runtime.score(probes[2:3], rows), scores[2:3])
    alone = [runtime.score(probes, [row]) for row in rows]
    assert_close(np.concatenate(alone, axis=1), scores)


def check_cut(case: Case) -> None:
    """Batches larger than a forward may be are cut, and nothing else changes."""
    rows, probes = tiny.rows("mixed", 8, seed=6), case.probes(directions=2)
    whole = case.runtime().score(probes, rows)
    for max_tokens in (16, 100):
        assert_close(case.runtime(max_tokens=max_tokens).score(probes, rows), whole)


def check_unnormalised(case: Case) -> None:
    """Without the normaliser, scores of a row of single-token candidates may miss one constant per probe, no more."""
    runtime = case.runtime()
    for kind in ("single", "mixed"):
        rows, probes = tiny.rows(kind, 6, seed=7), case.probes(directions=2)
        missing = runtime.score(probes, rows, normalised=False) - runtime.score(probes, rows)
        ends = np.cumsum([len(row.candidates) for row in rows])[:-1]
        for row, constant in zip(rows, np.split(missing, ends, axis=1), strict=True):
            allowed = constant[:, :1] if row.single_token else 0.0
            np.testing.assert_allclose(constant - allowed, 0.0, atol=20 * TOLERANCE)


def check_updates(case: Case) -> None:
    """After each of several updates, within a window and across its end, scores are the oracle's."""
    runtime, reference = case.both()
    rows = tiny.rows("mixed", 4, seed=8)
    before = reference.score([CLEAN], rows)
    updates = case.updates(5)
    for step, update in enumerate(updates):
        assert_close(runtime.score(case.probes(step), rows), reference.score(case.probes(step), rows))
        runtime.apply(update)
        reference.apply(update)
    after = reference.score([CLEAN], rows)
    assert np.abs(after - before).max() > 20 * TOLERANCE * np.abs(before).max()
    assert_close(runtime.score([CLEAN], rows), after)


def check_empty_update(case: Case) -> None:
    """An update without terms, a skipped step's, changes nothing."""
    runtime, reference = case.both()
    rows, optimizer = tiny.rows("mixed", 4, seed=9), Optimizer(case.method, 10)
    runtime.apply(case.updates(1)[0])
    reference.apply(case.updates(1)[0])
    before = runtime.score([CLEAN], rows)
    runtime.apply(optimizer.skip(optimizer.ask(1)))
    reference.apply(optimizer.skip(optimizer.ask(1)))
    np.testing.assert_array_equal(runtime.score([CLEAN], rows), before)
    assert_close(runtime.score(case.probes(2), rows), reference.score(case.probes(2), rows))


def check_repeats(case: Case) -> None:
    """The same question has the same answer, bit for bit, whatever was asked or expected in between."""
    runtime = case.runtime()
    rows, probes = tiny.rows("mixed", 5, seed=10), case.probes()
    first = runtime.score(probes, rows)
    runtime.score(case.probes(directions=3), tiny.rows("multi", 3, seed=11), normalised=False)
    if (foresees := foreseeing(runtime)) is not None:
        foresees.expect(case.probes(step=1), tiny.rows("mixed", 5, seed=11))
    np.testing.assert_array_equal(runtime.score(probes, rows), first)


def check_state(case: Case) -> None:
    """State taken in the middle of a window, loaded into a fresh runtime: the future is the same bit for bit."""
    rows, updates = tiny.rows("mixed", 4, seed=12), case.updates(7)
    runtime = case.runtime()
    for update in updates[:5]:
        runtime.apply(update)
    state = runtime.state()
    assert all(tensor.device.type == "cpu" for tensor in state.values())
    fresh = case.runtime()
    fresh.load_state(state, case.window(5))
    for step in (5, 6):
        np.testing.assert_array_equal(fresh.score(case.probes(step), rows), runtime.score(case.probes(step), rows))
        runtime.apply(updates[step])
        fresh.apply(updates[step])
    np.testing.assert_array_equal(fresh.score([CLEAN], rows), runtime.score([CLEAN], rows))
    again = case.runtime()
    again.load_state(state, case.window(5))
    for name, tensor in again.state().items():
        assert torch.equal(tensor, state[name]), f"{name} was changed by later updates"


def check_window(case: Case) -> None:
    """A probe of another window than the current one is refused, and the refusal leaves the runtime usable."""
    runtime = case.runtime()
    rows = tiny.rows("single", 2, seed=13)
    before = runtime.score(case.probes(), rows)
    message = ""
    try:
        runtime.score([Probe(DirectionKey(1, 0, 0), 1, case.method.eps)], rows)
    except ValueError as error:
        message = str(error)
    assert "window" in message, f"a probe of window 1 in window 0 must raise a ValueError that says so, got {message!r}"
    np.testing.assert_array_equal(runtime.score(case.probes(), rows), before)


def check_export(case: Case) -> None:
    """The exported folder is an ordinary checkpoint that scores as the runtime does, update of the window included."""
    runtime = case.runtime()
    for update in case.updates(5):
        runtime.apply(update)
    rows = tiny.rows("mixed", 4, seed=14)
    with tempfile.TemporaryDirectory() as folder:
        runtime.export(Path(folder) / "model")
        exported = AutoModelForCausalLM.from_pretrained(Path(folder) / "model")
        assert_close(runtime.score([CLEAN], rows)[0], oracle.DenseOracle(exported, ()).score(rows))


def check_generate(case: Case) -> None:
    """What the model writes on in the middle of a window is the oracle's token for token, and scores as before."""
    runtime, reference = case.both(max_tokens=48)
    for update in case.updates(5):
        runtime.apply(update)
        reference.apply(update)
    rows = tiny.rows("mixed", 4, seed=17)
    prompts = [row.prompt for row in rows] + [rows[0].prompt]
    before = runtime.score([CLEAN], rows)
    written = runtime.generate(prompts, max_new_tokens=6)
    assert written == reference.generate(prompts, max_new_tokens=6)
    stop = {tokens[index] for index, tokens in enumerate(written[:2])}
    stopped = reference.generate(prompts, max_new_tokens=6, stop=stop)
    assert min(map(len, stopped)) < 6
    assert runtime.generate(prompts, max_new_tokens=6, stop=stop) == stopped
    np.testing.assert_array_equal(runtime.score([CLEAN], rows), before)


def check_close(case: Case) -> None:
    """A runtime may be closed twice, and the next one scores as it did."""
    rows, probes = tiny.rows("mixed", 4, seed=18), case.probes()
    runtime = case.runtime()
    scores = runtime.score(probes, rows)
    runtime.close()
    runtime.close()
    np.testing.assert_array_equal(case.runtime().score(probes, rows), scores)


def check_sixteen_bits(case: Case) -> None:
    """A bfloat16 model is scored as well as its format allows, before and after updates."""
    model = case.model(torch.bfloat16)
    reference = OracleRuntime(model, case.method, sites=case.runtime().layout.sites)
    runtime = case.factory(model, case.method)
    rows = tiny.rows("mixed", 6, seed=15)
    for step, update in enumerate(case.updates(4)):
        scores, expected = (side.score(case.probes(step), rows) for side in (runtime, reference))
        assert scores.dtype == np.float32
        # Sums of up to four log-probabilities of logits near 5, whose bfloat16 step is 0.03, after two layers.
        np.testing.assert_allclose(scores, expected, atol=0.5)
        assert np.abs(scores - expected).mean() < 0.08
        runtime.apply(update)
        reference.apply(update)


def check_parity(case: Case, steps: int = 100) -> None:
    """Whole training runs stay together: every probe loss within the tolerance, every coefficient of one sign.

    Both sides compute their own losses, coefficients and updates; only the directions are the same.
    """
    runtime, reference = case.both()
    examples = tiny.examples(3, seed=16)
    rows = [example.row for example in examples]
    objective, optimizer = CandidateCrossEntropy(), Optimizer(case.method, steps)
    for step in range(steps):
        proposal = optimizer.ask(step)
        told = []
        for side in (runtime, reference):
            losses = batch_losses(objective, side.score(proposal.probes, rows), examples)
            update = optimizer.tell(proposal, losses)
            told.append((losses, update))
            side.apply(update)
        (mine, my_update), (theirs, their_update) = told
        np.testing.assert_allclose(mine, theirs, rtol=TOLERANCE, err_msg=f"losses of step {step}")
        for (_, a), (_, b) in zip(my_update.terms, their_update.terms, strict=True):
            assert a * b > 0, f"step {step}: coefficients {a} and {b} differ in sign"


CHECKS = (
    check_sites,
    check_fingerprint,
    check_probes,
    check_rows,
    check_order,
    check_cut,
    check_unnormalised,
    check_updates,
    check_empty_update,
    check_repeats,
    check_state,
    check_window,
    check_export,
    check_generate,
    check_close,
)
"""The checks that hold for every family and every method of `METHODS` but LoRA's export."""
