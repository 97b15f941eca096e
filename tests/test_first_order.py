from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from zotune.evaluate import Metrics, evaluate
from zotune.objectives import CandidateCrossEntropy, CompletionNLL, Objective
from zotune.optimizer import Method
from zotune.protocol import CLEAN, DirectionKey, Probe
from zotune.rows import Example
from zotune.testing import tiny
from zotune.testing.baselines.first_order import FirstOrder, mean_loss
from zotune.testing.reference import OracleRuntime


def examples(kind: str = "mixed", count: int = 8) -> list[Example]:
    rows = tiny.rows(kind, count)  # type: ignore[arg-type]
    return [Example(row, gold=number % len(row.candidates)) for number, row in enumerate(rows)]


@pytest.mark.parametrize("objective", [CandidateCrossEntropy(), CompletionNLL()], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("family", ["opt", "llama-tied", "gemma2"])
def test_the_loss_is_the_objectives_of_the_oracles_scores(family: str, objective: Objective) -> None:
    model, batch = tiny.model(family), examples()
    scores = OracleRuntime(model, Method()).score([CLEAN], [example.row for example in batch])
    with torch.no_grad():
        found = float(mean_loss(model, objective, batch))
    assert found == pytest.approx(float(objective.losses(scores, batch).mean()), rel=1e-5)


def test_coefficients_estimate_the_gradient() -> None:
    model, batch, objective = tiny.model("llama"), examples("single"), CandidateCrossEntropy()
    reference = OracleRuntime(model, Method())
    gradients = torch.autograd.grad(mean_loss(model, objective, batch), list(model.parameters()))
    rows = [example.row for example in batch]
    slopes, coefficients = [], []
    for number in range(12):
        key = DirectionKey(0, number, 0)
        scores = reference.score([Probe(key, sign, 2e-4) for sign in (1, -1)], rows)
        plus, minus = objective.losses(scores, batch).mean(axis=1, dtype=np.float64)
        coefficients.append((plus - minus) / 4e-4)
        slopes.append(
            sum(float((g * d).sum()) for g, d in zip(gradients, reference.directions.dense(key), strict=True))
        )
    assert coefficients == pytest.approx(slopes, rel=0.02, abs=0.05)


def judged(model: Any, batch: list[Example]) -> Metrics:
    return evaluate(OracleRuntime(model, Method(scope="linear")), batch, CandidateCrossEntropy()).metrics


@pytest.mark.parametrize("rank", [None, 4])
def test_steps_reduce_the_loss_of_what_is_tuned_alone(rank: int | None) -> None:
    model, batch = tiny.model("llama"), examples("single")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tuner = FirstOrder(model, CandidateCrossEntropy(), lr=1e-2, steps=20, lora_rank=rank)
    first = judged(model, batch)
    losses = [tuner.step(batch) for _ in range(20)]
    last = judged(model, batch)
    assert losses[0] == pytest.approx(first.loss, rel=1e-4)
    assert last.loss < 0.5 * losses[0]
    assert last.accuracy == 1.0
    named = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    moved = {name for name, parameter in before.items() if not torch.equal(parameter, named[name])}
    assert moved == (set(before) if rank is None else set())


def test_the_learning_rate_falls_to_nothing() -> None:
    tuner = FirstOrder(tiny.model("opt"), CandidateCrossEntropy(), lr=1e-2, steps=2)
    for _ in range(2):
        tuner.step(examples("single"))
    before = [parameter.detach().clone() for parameter in tuner.model.parameters()]
    tuner.step(examples("single"))
    assert all(torch.equal(a, b) for a, b in zip(before, tuner.model.parameters(), strict=True))
