"""On a quadratic the estimates are known exactly; on tiny models autograd knows the directional derivative."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zotune.directions import DenseDirections, LowRankDirections
from zotune.estimators import Damped, OneSided, Standardised, TwoPoint
from zotune.layout import Site
from zotune.objectives import CompletionNLL
from zotune.optimizer import Method, Optimizer
from zotune.protocol import CLEAN, DirectionKey, Probe
from zotune.rows import Example, Row
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.testing import oracle, tiny

KEYS = [DirectionKey(0, 5, index) for index in range(3)]


def test_two_point_asks_for_plus_and_minus_of_each_direction() -> None:
    assert TwoPoint().probes(KEYS[:2], 0.1) == tuple(Probe(key, sign, 0.1) for key in KEYS[:2] for sign in (1, -1))


def test_one_sided_asks_for_the_clean_model_once() -> None:
    assert OneSided().probes(KEYS, 0.1) == (CLEAN, *(Probe(key, 1, 0.1) for key in KEYS))


def test_two_point_coefficients_by_hand() -> None:
    assert TwoPoint().coefficients([1.5, 1.0], 0.25) == (1.0,)
    assert TwoPoint().coefficients([1.5, 1.0, 2.0, 4.0], 0.25) == (0.5, -2.0)


def test_one_sided_coefficients_by_hand() -> None:
    assert OneSided().coefficients([1.0, 1.5], 0.25) == (2.0,)
    assert OneSided().coefficients([1.0, 1.5, 0.0, 1.0], 0.5) == pytest.approx((1 / 3, -2 / 3, 0.0))


@pytest.mark.parametrize("estimator", [Standardised(), Damped()])
def test_the_many_direction_estimators_share_one_clean_score(estimator: OneSided) -> None:
    assert estimator.probes(KEYS, 0.1) == OneSided().probes(KEYS, 0.1)


def test_standardised_coefficients_by_hand() -> None:
    # The losses 3 and 1 have standard deviation 1.
    assert Standardised().coefficients([1.0, 3.0, 1.0], 0.5) == (1.0, 0.0)
    assert Standardised().coefficients([0.5, 3.0, 1.0], 0.5) == (1.25, 0.25)


def test_standardised_coefficients_do_not_depend_on_how_far_and_how_large_the_losses_are() -> None:
    losses, larger = [1.0, 1.5, 0.25, 2.0], [7.0 + 100 * loss for loss in [1.0, 1.5, 0.25, 2.0]]
    assert Standardised().coefficients(larger, 1e-4) == pytest.approx(Standardised().coefficients(losses, 0.5))


def test_standardised_has_no_estimate_where_all_losses_are_equal() -> None:
    assert [math.isnan(c) for c in Standardised().coefficients([1.0, 2.0, 2.0], 0.5)] == [True, True]


def test_damped_coefficients_by_hand() -> None:
    # Slopes of 1024 and -0.5: the tenth root of 1024 is 2, and small slopes are as they are.
    assert Damped().coefficients([0.0, 1024.0, -0.5], 1.0) == pytest.approx((256.0, -0.25))


class Quadratic:
    """``L(x) = 1/2 x^T H x + g^T x`` around a point, in float64."""

    def __init__(self, size: int) -> None:
        generator = np.random.default_rng(0)
        root = generator.normal(size=(size, size))
        self.curvature, self.slope = root @ root.T, generator.normal(size=size)
        self.at = generator.normal(size=size)

    def loss(self, shift: np.ndarray) -> float:
        x = self.at + shift
        return float(x @ self.curvature @ x / 2 + self.slope @ x)

    @property
    def gradient(self) -> np.ndarray:
        return self.curvature @ self.at + self.slope

    def losses(self, probes: tuple[Probe, ...], direction: Callable[[DirectionKey], np.ndarray]) -> list[float]:
        return [self.loss(0 if p.key is None else p.sign * p.eps * direction(p.key)) for p in probes]


def flat(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat([tensor.flatten() for tensor in tensors]).double().numpy()


@pytest.mark.parametrize("eps", [1e-2, 1.0, 30.0])
def test_on_a_quadratic_two_point_is_the_directional_derivative_at_any_distance(eps: float) -> None:
    quadratic, directions = Quadratic(20), DenseDirections([Site("w", (4, 5))], seed=0)
    losses = quadratic.losses(TwoPoint().probes(KEYS, eps), lambda key: flat(directions.dense(key)))
    exact = [quadratic.gradient @ flat(directions.dense(key)) / 3 for key in KEYS]
    np.testing.assert_allclose(TwoPoint().coefficients(losses, eps), exact, rtol=1e-8)


@pytest.mark.parametrize("eps", [1e-2, 1.0])
def test_on_a_quadratic_one_sided_errs_by_the_curvature(eps: float) -> None:
    quadratic, directions = Quadratic(20), DenseDirections([Site("w", (4, 5))], seed=0)
    losses = quadratic.losses(OneSided().probes(KEYS, eps), lambda key: flat(directions.dense(key)))
    drawn = [flat(directions.dense(key)) for key in KEYS]
    exact = [(quadratic.gradient @ u + eps / 2 * u @ quadratic.curvature @ u) / 3 for u in drawn]
    np.testing.assert_allclose(OneSided().coefficients(losses, eps), exact, rtol=1e-8)


def second_moment(kind: str, rank: int, out: int, width: int) -> float:
    """``E[<G, D>^2 |D|^2] / |G|^2`` for a direction D of shape ``(out, width)`` with standard normal factors.

    By Isserlis' theorem over the terms of ``D = sum_k u_k v_k^T``: all four indices equal, equal in pairs within each
    factor ``<G, D>^2`` and ``|D|^2``, or in pairs across them.
    """
    if kind == "dense":
        return out * width + 2
    return rank * (out + 2) * (width + 2) + rank * (rank - 1) * (out * width + 2)


@pytest.mark.parametrize(("kind", "rank"), [("dense", 1), ("low-rank", 1), ("low-rank", 3)])
def test_on_a_quadratic_the_mean_estimate_is_proportional_to_the_gradient(kind: str, rank: int) -> None:
    """Its length tends to the gradient's, times the rank, and its angle to the one that so many directions allow."""
    site, count, out, width = Site("w", (6, 8)), 2000, 6, 8
    quadratic = Quadratic(48)
    made = DenseDirections([site], seed=1) if kind == "dense" else LowRankDirections([site], seed=1, rank=rank)
    total = np.zeros(48)
    for step in range(count):
        key = DirectionKey(step, step, 0)
        direction = flat(made.dense(key))
        losses = quadratic.losses(TwoPoint().probes([key], 0.1), lambda _, u=direction: u)
        total += TwoPoint().coefficients(losses, 0.1)[0] * direction
    gradient, estimate = quadratic.gradient, total / count
    along = estimate @ gradient / (gradient @ gradient)
    cosine = estimate @ gradient / np.linalg.norm(estimate) / np.linalg.norm(gradient)
    noise = (second_moment(kind, rank, out, width) - rank**2) / count
    # The part of the noise along the gradient is of order noise / 48.
    assert along == pytest.approx(rank, abs=5 * math.sqrt(3 * noise / 48))
    assert cosine == pytest.approx(rank / math.sqrt(rank**2 + noise), abs=0.004)
    assert cosine > 0.96


def smooth(family: str) -> PreTrainedModel:
    """A tiny model that is differentiable: OPT's ReLU has kinks within the distance of a probe."""
    model: PreTrainedModel = tiny.model(family)  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(getattr(module, "activation_fn", None), nn.ReLU):
            module.activation_fn = nn.GELU()
    return model


def gradients(family: str, rows: Sequence[Row]) -> dict[str, Tensor]:
    """The gradient of the mean completion loss at each parameter, computed on the unmodified model."""
    model, losses = smooth(family), []
    for row in rows:
        candidate = row.candidates[0]
        tokens = torch.tensor([[*row.prompt, *candidate.tokens]])
        log_probabilities = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
        at = torch.tensor([len(row.prompt) + index for index in candidate.scored])
        losses.append(-log_probabilities[at - 1, tokens[0, at]].mean())
    torch.stack(losses).mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    return {name: grad.T if name in transposed else grad for name, grad in found.items()}


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama-tied", "qwen3", "gemma3"])
def test_coefficients_on_a_model_are_its_directional_derivatives(
    family: str, kind: Literal["low-rank", "dense"]
) -> None:
    method = Method(family=kind, directions=6, eps=1e-4)
    runtime, optimizer = EmbeddedRuntime(smooth(family), method, seed=5), Optimizer(method, 1)
    rows = [Row(row.prompt, row.candidates[:1]) for row in tiny.rows("multi", 8, seed=3)]
    proposal = optimizer.ask(0)
    losses = CompletionNLL().losses(runtime.score(proposal.probes, rows), [Example(row) for row in rows])
    update = optimizer.tell(proposal, losses.mean(1, dtype=np.float64).tolist())

    exact, sites = gradients(family, rows), runtime.layout.sites
    assert {site.name for site in sites} == set(exact)
    gradient, directions = flat([exact[site.name] for site in sites]), oracle.directions(sites, method, seed=5)
    derivatives = np.array([gradient @ flat(directions.dense(key)) / method.directions for key, _ in update.terms])
    coefficients = np.array([coefficient for _, coefficient in update.terms])
    assert np.linalg.norm(coefficients - derivatives) < 0.01 * np.linalg.norm(derivatives)
