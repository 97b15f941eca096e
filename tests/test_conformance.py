"""The conformance suite on the embedded runtime, and on the oracle itself, which shows that the suite can be passed."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from zotune.optimizer import Method
from zotune.protocol import Update
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.spaces import skinny
from zotune.testing import conformance, tiny
from zotune.testing.conformance import CHECKS, METHODS, Case
from zotune.testing.reference import OracleRuntime

Check = Callable[[Case], None]


pytestmark = pytest.mark.usefixtures("one_thread")


def oracle(model: Any, method: Method, *, seed: int = 0, max_tokens: int = 16384) -> OracleRuntime:
    return OracleRuntime(model, method, seed=seed)


NUMBERS = (
    conformance.check_sites,
    conformance.check_probes,
    conformance.check_updates,
    conformance.check_empty_update,
    conformance.check_state,
)
"""The checks that a method, rather than a model or the packing, can break."""


WHOLE = (conformance.check_export, conformance.check_generate, conformance.check_close)
"""Those that look at the model as a whole."""


def identify(value: Any) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("check", CHECKS, ids=identify)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_embedded_families(family: str, check: Check) -> None:
    check(Case(EmbeddedRuntime, family, METHODS["all"]))


@pytest.mark.parametrize("check", NUMBERS, ids=identify)
@pytest.mark.parametrize(
    ("family", "method"),
    [
        *((family, scope) for scope in ("linear", "last-layers") for family in ("opt", "gpt2", "llama-tied", "gemma3")),
        *(("llama-tied", method) for method in ("rank-one", "rademacher", "momentum", "decay")),
        *((family, "dense") for family in ("opt", "gpt2", "llama-tied", "gemma2")),
        ("qwen2", "dense-linear"),
        ("opt", "dense-last-layers"),
    ],
)
def test_embedded_methods(family: str, method: str, check: Check) -> None:
    check(Case(EmbeddedRuntime, family, METHODS[method]))


@pytest.mark.parametrize("check", NUMBERS, ids=identify)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_embedded_lora(family: str, check: Check) -> None:
    pytest.importorskip("peft")
    check(Case(EmbeddedRuntime, family, METHODS["lora"]))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=identify)
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("all", "lora")])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_embedded_everything(family: str, method: str, check: Check) -> None:
    check(Case(EmbeddedRuntime, family, METHODS[method]))


@pytest.mark.parametrize("check", [conformance.check_probes, conformance.check_updates], ids=identify)
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama-tied"])
def test_factors_that_are_filled_up_add_nothing(family: str, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "_ALIGNED", {"cpu": 8})
    check(Case(EmbeddedRuntime, family, METHODS["all"]))


BESIDE = [
    *itertools.product(("opt", "gpt2", "llama-tied", "qwen2", "gemma3"), ("all",), (1,), (*NUMBERS, *WHOLE)),
    *itertools.product(("opt",), ("linear", "last-layers", "momentum", "decay"), (1,), NUMBERS),
    *itertools.product(("opt", "llama-tied"), ("all",), (3,), NUMBERS),
]


@pytest.mark.parametrize(("family", "method", "directions", "check"), BESIDE, ids=identify)
@pytest.mark.usefixtures("everywhere_beside")
def test_factors_beside_weights(family: str, method: str, directions: int, check: Check) -> None:
    check(Case(EmbeddedRuntime, family, replace(METHODS[method], directions=directions)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_embedded_bfloat16(family: str) -> None:
    conformance.check_sixteen_bits(Case(EmbeddedRuntime, family, METHODS["all"]))


def test_embedded_bfloat16_dense() -> None:
    conformance.check_sixteen_bits(Case(EmbeddedRuntime, "llama-tied", METHODS["dense"]))


@pytest.mark.parametrize("preset", ["lozo", "mezo"])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_embedded_parity_over_100_steps(family: str, preset: str) -> None:
    method = Method(family="low-rank" if preset == "lozo" else "dense", eps=1e-3, lr=1e-4, interval=10)
    conformance.check_parity(Case(EmbeddedRuntime, family, method))


@pytest.mark.parametrize("check", CHECKS, ids=identify)
def test_the_oracle_conforms(check: Check) -> None:
    check(Case(oracle, "llama-tied", METHODS["momentum"]))


class ForgetsBiases(OracleRuntime):
    """Leaves every vector where it is."""

    def apply(self, update: Update) -> None:
        kept = [weight.clone() for weight in self.oracle.weights]
        super().apply(update)
        for weight, value in zip(self.oracle.weights, kept, strict=True):
            if weight.dim() == 1:
                weight.copy_(value)


class SwapsSigns(OracleRuntime):
    """Scores plus for minus."""

    def score(self, probes: Any, rows: Any, *, normalised: bool = True) -> np.ndarray:
        order = [p if p.key is None else type(p)(p.key, -p.sign, p.eps) for p in probes]
        return super().score(order, rows, normalised=normalised)


class ForgetsMomentum(OracleRuntime):
    """Comes back from a checkpoint without its momentum."""

    def load_state(self, state: Any, window: int) -> None:
        super().load_state(state, window)
        for average in self._momentum:
            average.zero_()


class Believes(OracleRuntime):
    """Scores the rows that it expects, and not those that it is asked."""

    expected: Any = None

    def expect(self, probes: Any, rows: Any, *, normalised: bool = True) -> None:
        self.expected = rows

    def score(self, probes: Any, rows: Any, *, normalised: bool = True) -> np.ndarray:
        return super().score(probes, self.expected or rows, normalised=normalised)


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (Believes, conformance.check_repeats),
        (ForgetsBiases, conformance.check_updates),
        (SwapsSigns, conformance.check_probes),
        (ForgetsMomentum, conformance.check_state),
    ],
)
def test_the_suite_catches_a_broken_runtime(broken: type[OracleRuntime], check: Check) -> None:
    def factory(model: Any, method: Method, *, seed: int = 0, max_tokens: int = 16384) -> OracleRuntime:
        return broken(model, method, seed=seed)

    with pytest.raises(AssertionError):
        check(Case(factory, "opt", METHODS["momentum"]))
