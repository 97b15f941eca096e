from __future__ import annotations

import math

import pytest
import torch

from zotune.evaluate import Metrics, evaluate
from zotune.objectives import CandidateCrossEntropy, CompletionNLL
from zotune.optimizer import Method, Optimizer
from zotune.rows import Candidate, Example, Row
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.testing import tiny

LONG = (5, 9, 33, 7)
EXAMPLES = [
    Example(Row(LONG, (Candidate((11,), (0,)), Candidate((12,), (0,)))), gold=1),
    Example(Row((8,), (Candidate((20, 21, 22), (1, 2)), Candidate((23,), (0,)), Candidate((20, 24), (0, 1)))), gold=2),
    Example(Row((40, 41), (Candidate((11,), (0,)), Candidate((50, 51), (1,)))), gold=1),
]
COMPLETIONS = [
    Example(Row(LONG, (Candidate((20, 21, 22), (1, 2)),))),
    Example(Row((8,), (Candidate((30,), (0,)),))),
]


@pytest.fixture
def runtime() -> EmbeddedRuntime:
    return EmbeddedRuntime(tiny.model("llama"), Method())


def by_hand(examples: list[Example]) -> list[list[float]]:
    """Mean log-probability of each candidate's scored tokens, one plain forward per candidate."""
    model, means = tiny.model("llama"), []
    for example in examples:
        prompt = example.row.prompt
        means.append([])
        for candidate in example.row.candidates:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + candidate.tokens])).logits[0].double()
            places = [len(prompt) + place for place in candidate.scored]
            scores = [float(logits[p - 1].log_softmax(-1)[(prompt + candidate.tokens)[p]]) for p in places]
            means[-1].append(sum(scores) / len(scores))
    return means


def test_classification_by_hand(runtime: EmbeddedRuntime) -> None:
    means = by_hand(EXAMPLES)
    losses = [math.log(sum(map(math.exp, row))) - row[each.gold] for row, each in zip(means, EXAMPLES, strict=True)]
    right = [max(range(len(row)), key=row.__getitem__) == each.gold for row, each in zip(means, EXAMPLES, strict=True)]
    assert 0 < sum(right) < 3, "the examples must tell right from wrong"
    metrics = evaluate(runtime, EXAMPLES, CandidateCrossEntropy())
    assert metrics == Metrics(pytest.approx(sum(losses) / 3, rel=1e-5), sum(right) / 3, 3)


def test_completions_by_hand_have_no_accuracy(runtime: EmbeddedRuntime) -> None:
    (first,), (second,) = by_hand(COMPLETIONS)
    metrics = evaluate(runtime, COMPLETIONS, CompletionNLL())
    assert metrics == Metrics(pytest.approx(-(first + second) / 2, rel=1e-5), None, 2)


def test_the_model_is_scored_as_it_is_now_and_stays_so(runtime: EmbeddedRuntime) -> None:
    before = evaluate(runtime, EXAMPLES, CandidateCrossEntropy())
    optimizer = Optimizer(Method(lr=1e-2), 10)
    runtime.apply(optimizer.tell(optimizer.ask(0), [1.0, 0.9]))
    state = runtime.state()
    after = evaluate(runtime, EXAMPLES, CandidateCrossEntropy())
    assert after.loss != before.loss
    assert evaluate(runtime, EXAMPLES, CandidateCrossEntropy()) == after
    assert all(torch.equal(tensor, state[name]) for name, tensor in runtime.state().items())


def test_a_broken_model_is_never_right() -> None:
    model = tiny.model("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(math.nan)
    metrics = evaluate(EmbeddedRuntime(model, Method()), EXAMPLES, CandidateCrossEntropy())
    assert math.isnan(metrics.loss)
    assert metrics.accuracy == 0
