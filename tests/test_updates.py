import pytest
import torch

from zotune.directions import LowRankDirections
from zotune.layout import Site
from zotune.optimizer import Method, Optimizer
from zotune.protocol import DirectionKey
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.testing import oracle, tiny
from zotune.updates import Momentum, Sgd, combine

SITES = (Site("a.weight", (5, 400)), Site("a.bias", (5,), decays=False), Site("b.weight", (3, 8)))


def test_combine_sums_the_terms_in_their_order() -> None:
    terms = [(torch.tensor([1.0, 2.0]), 0.5), (torch.tensor([3.0, -1.0]), 2.0), (torch.tensor([0.0, 1.0]), -1.0)]
    assert combine(terms).tolist() == [6.5, -2.0]


def test_sgd_by_hand() -> None:
    factors = torch.tensor([1.0, 2.0])
    Sgd().step(factors, torch.tensor([4.0, -2.0]), lr=0.25)
    assert factors.tolist() == [0.0, 2.5]
    assert Sgd().state() == {}


def test_momentum_by_hand() -> None:
    rule, factors = Momentum(0.75, 2), torch.tensor([1.0, 2.0])
    rule.step(factors, torch.tensor([4.0, -8.0]), lr=0.5)
    # N = 0.25 g, then N = 0.75 N + 0.25 g.
    assert factors.tolist() == [0.5, 3.0]
    rule.step(factors, torch.tensor([0.0, 8.0]), lr=0.5)
    assert rule.average.tolist() == [0.75, 0.5]
    assert factors.tolist() == [0.125, 2.75]


def test_momentum_comes_back_from_its_state() -> None:
    rule, fresh = Momentum(0.9, 3), Momentum(0.9, 3)
    rule.step(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]), lr=1.0)
    saved = {name: tensor.clone() for name, tensor in rule.state().items()}
    fresh.load_state(saved)
    after = [torch.zeros(3), torch.zeros(3)]
    for each, factors in zip((rule, fresh), after, strict=True):
        each.step(factors, torch.tensor([1.0, -1.0, 0.0]), lr=1.0)
    assert torch.equal(*after)
    assert torch.equal(saved["momentum"], torch.tensor([1.0, 2.0, 3.0]) * (1 - 0.9))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_momentum_is_projected_onto_the_next_window(scale: float) -> None:
    directions = LowRankDirections(SITES, seed=2, rank=4, scale=scale)
    rule = Momentum(0.9, directions.factors.size)
    rule.average.copy_(directions.draw(DirectionKey(3, 0, 0)))
    before = [view.clone() for view in directions.factors.views(rule.average)]
    rule.turn(directions, 3)
    after = directions.factors.views(rule.average)
    assert torch.equal(after[1], before[1])
    for index, width in ((0, 400), (2, 8)):
        old, new = directions.window(3)[index], directions.window(4)[index]
        assert old is not None
        assert new is not None
        # LOZO-M's N (V_old^T V_new) / n is about V without the scale.
        torch.testing.assert_close(after[index], before[index] @ (old.T @ new) / (width * scale**2))
    # With many rows of V the formula is the least-squares projection of N V_old^T onto the new window.
    old, new = directions.window(3)[0], directions.window(4)[0]
    assert old is not None
    assert new is not None
    nearest = torch.linalg.lstsq(new, (before[0] @ old.T).T).solution.T
    assert (after[0] - nearest).norm() < 0.25 * nearest.norm()


def test_momentum_turned_into_the_same_space_stays() -> None:
    """With an orthogonal V, ``V^T V = n I``, a window that repeats it keeps N as it is."""

    class Repeating(LowRankDirections):
        def window(self, index: int) -> list[torch.Tensor | None]:
            return [torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]])]

    directions = Repeating([Site("w", (3, 4))], seed=0, rank=2)
    rule = Momentum(0.9, directions.factors.size)
    rule.average.copy_(torch.arange(len(rule.average)))
    rule.turn(directions, 0)
    assert torch.equal(rule.average, torch.arange(len(rule.average), dtype=torch.float32))


@pytest.mark.parametrize("family", ["low-rank", "dense"])
def test_weight_decay_is_that_of_dense_steps(family: str) -> None:
    """Two windows of ``W <- (1 - lr wd) W - lr sum c D``, biases and layer norms spared, against float64."""
    method = Method(family=family, interval=4, lr=1e-2, weight_decay=3.0, directions=2)  # type: ignore[arg-type]
    model = tiny.model("opt")
    exact = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    runtime, optimizer = EmbeddedRuntime(model, method, seed=1), Optimizer(method, 8)  # type: ignore[arg-type]
    directions = oracle.directions(runtime.layout.sites, method, seed=1)
    for step in range(8):
        # A skipped step decays nothing.
        update = optimizer.update(step, () if step == 5 else (0.1 * step - 0.3, 0.2))
        runtime.apply(update)
        drawn = [(directions.dense(key), coefficient) for key, coefficient in update.terms]
        for index, site in enumerate(runtime.layout.sites if drawn else ()):
            spared = "bias" in site.name or "layer_norm" in site.name
            change = sum(coefficient * direction[index].double() for direction, coefficient in drawn)
            exact[site.name] = (1 if spared else 1 - 1e-2 * 3.0) * exact[site.name] - 1e-2 * change
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), exact[name], rtol=0, atol=2e-6)
