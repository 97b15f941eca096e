"""Directions and updates of all sites; that they are the oracle's is shown by `tests/test_conformance.py`."""

import torch

from zotune.layout import Site
from zotune.optimizer import Method, Optimizer
from zotune.runtimes.folding.fold import StochasticFold
from zotune.runtimes.spaces.lowrank import LowRankSpace


def test_what_decay_has_left_comes_back_to_the_last_bit() -> None:
    site, method = Site("w", (3, 2)), Method(lr=0.01, weight_decay=0.7)
    space, fresh = (LowRankSpace([site], method, 0, torch.device("cpu")) for _ in range(2))
    for step in range(3):
        space.apply(Optimizer(method, 3).update(step, (1.0,)), {site: torch.ones(3, 2)}, StochasticFold(0))
    fresh.load_state(space.state(), 0)
    assert fresh.sites[site].keep == space.sites[site].keep != 1.0
