from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from zotune.directions import DenseDirections
from zotune.layout import Site
from zotune.optimizer import Method, Optimizer
from zotune.runtimes.engine.tokens import Part
from zotune.runtimes.engine.weights import ShardFold
from zotune.runtimes.folding.fold import StochasticFold
from zotune.runtimes.spaces.dense import DenseSpace

SITES = tuple(Site(f"{number}.weight", (6, 5)) for number in range(4))
HALF = slice(0, 3)


@pytest.mark.parametrize("where", ["torch", "vllm", "a shard in vllm"])
def test_little_of_an_update_is_in_memory_at_a_time(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site's sum so far, what is added to it, and the sum of the site before; each is as large as a weight."""
    drawn: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    draw = DenseDirections.draw

    def counted(*args: Any) -> Tensor:
        made = draw(*args)
        drawn.append(weakref.ref(made))
        alive.append(sum(each() is not None for each in drawn))
        return made

    monkeypatch.setattr(DenseDirections, "draw", counted)
    method, rows = Method(family="dense", directions=5), HALF if "shard" in where else slice(None)
    weights = {site: torch.zeros(site.shape)[rows] for site in SITES}
    whole = StochasticFold(0)
    fold = whole if where == "torch" else ShardFold(whole, {site: Part(site, rows, rows) for site in SITES})
    update = Optimizer(method, steps=1).update(0, (1.0,) * method.directions)
    DenseSpace(SITES, method, 0, torch.device("cpu")).apply(update, weights, fold)
    assert len(alive) == method.directions * len(SITES)
    assert max(alive) == 3
    assert all(weight.all() for weight in weights.values())
