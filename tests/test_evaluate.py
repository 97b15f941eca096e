from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from zotune.config import parse
from zotune.evaluate import MAX_NEW_TOKENS, Evaluation, Metrics, evaluate
from zotune.objectives import CandidateCrossEntropy, CompletionNLL
from zotune.optimizer import Method, Optimizer
from zotune.reporters import SilentReporter
from zotune.rows import Candidate, Example, Row
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.testing import tiny
from zotune.train import evaluate_run, start

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
    evaluation = evaluate(runtime, EXAMPLES, CandidateCrossEntropy())
    assert evaluation.metrics == Metrics(pytest.approx(sum(losses) / 3, rel=1e-5), sum(right) / 3, 3)
    assert evaluation.right == tuple(right)
    assert evaluation.predicted == tuple(max(range(len(row)), key=row.__getitem__) for row in means)


def test_completions_by_hand_have_no_accuracy(runtime: EmbeddedRuntime) -> None:
    (first,), (second,) = by_hand(COMPLETIONS)
    metrics = Metrics(pytest.approx(-(first + second) / 2, rel=1e-5), None, 2)
    assert evaluate(runtime, COMPLETIONS, CompletionNLL()) == Evaluation(metrics)


def test_the_likelier_choice_is_judged_where_the_gold_one_is_learnt(runtime: EmbeddedRuntime) -> None:
    means = by_hand(EXAMPLES)
    evaluation = evaluate(runtime, EXAMPLES, CompletionNLL())
    gold = [row[each.gold] for row, each in zip(means, EXAMPLES, strict=True)]
    assert evaluation.metrics.loss == pytest.approx(-sum(gold) / 3, rel=1e-5)
    assert evaluation.right == evaluate(runtime, EXAMPLES, CandidateCrossEntropy()).right
    assert evaluation.metrics.accuracy == sum(evaluation.right) / 3


def test_the_model_is_scored_as_it_is_now_and_stays_so(runtime: EmbeddedRuntime) -> None:
    before = evaluate(runtime, EXAMPLES, CandidateCrossEntropy())
    optimizer = Optimizer(Method(lr=1e-2), 10)
    runtime.apply(optimizer.tell(optimizer.ask(0), [1.0, 0.9]))
    state = runtime.state()
    after = evaluate(runtime, EXAMPLES, CandidateCrossEntropy())
    assert after.metrics.loss != before.metrics.loss
    assert evaluate(runtime, EXAMPLES, CandidateCrossEntropy()) == after
    assert all(torch.equal(tensor, state[name]) for name, tensor in runtime.state().items())


def test_a_broken_model_is_never_right() -> None:
    model = tiny.model("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(math.nan)
    evaluation = evaluate(EmbeddedRuntime(model, Method()), EXAMPLES, CandidateCrossEntropy())
    assert math.isnan(evaluation.metrics.loss)
    assert evaluation.metrics.accuracy == 0
    assert evaluation.predicted == (-1, -1, -1)


PROMPTS = [(5, 9, 33, 7), (8,), (40, 41), (8, 9)]


def spell(tokens: Sequence[int]) -> str:
    return " ".join(f"word{token}" for token in tokens)


def writing(answers: Sequence[tuple[str, ...]]) -> list[Example]:
    gold = (Candidate((20, 21), (0, 1)),)
    return [Example(Row(prompt, gold), answers=each) for prompt, each in zip(PROMPTS, answers, strict=True)]


def test_what_is_written_is_judged_by_the_answers(runtime: EmbeddedRuntime) -> None:
    texts = [spell(tokens) for tokens in runtime.generate(PROMPTS, max_new_tokens=MAX_NEW_TOKENS)]
    half = " ".join(texts[1].split()[:25])
    examples = writing([("no", texts[0].upper() + "."), (half,), ("nothing of it",), ()])
    evaluation = evaluate(runtime, examples, CompletionNLL(), spell)
    assert evaluation.predicted == tuple(texts)
    assert evaluation.right == (True, False, False, False)
    assert evaluation.metrics.exact_match == 1 / 4
    assert evaluation.metrics.f1 == pytest.approx((1 + 2 * 25 / 75) / 4)
    assert evaluation.metrics.accuracy is None
    assert evaluation.metrics.loss == evaluate(runtime, examples, CompletionNLL()).metrics.loss


def test_the_model_writes_on_from_the_prompt_alone(runtime: EmbeddedRuntime) -> None:
    # Each row's prompt ends in a token that has merged with the answer.
    examples = [
        Example(Row((*prompt[:-1], 60), example.row.candidates), answers=("a",), alone=prompt)
        for prompt, example in zip(PROMPTS, writing([("a",)] * 4), strict=True)
    ]
    texts = tuple(spell(tokens) for tokens in runtime.generate(PROMPTS, max_new_tokens=MAX_NEW_TOKENS))
    assert evaluate(runtime, examples, CompletionNLL(), spell).predicted == texts


def test_an_answer_ends_at_a_stop_token_or_a_line_break(runtime: EmbeddedRuntime) -> None:
    written = runtime.generate(PROMPTS, max_new_tokens=MAX_NEW_TOKENS)
    examples = writing([("a",)] * 4)
    end = written[0][2]
    stopped = evaluate(runtime, examples, CompletionNLL(), spell, stop=[end]).predicted[0]
    assert stopped == spell(written[0][: written[0].index(end) + 1])

    def lines(tokens: Sequence[int]) -> str:
        return " " + spell(tokens[:1]) + " \n" + spell(tokens[1:])

    broken = evaluate(runtime, examples, CompletionNLL(), lines).predicted
    assert broken == tuple(spell(tokens[:1]) for tokens in written)


def test_without_a_way_to_read_tokens_there_is_a_loss_only(runtime: EmbeddedRuntime) -> None:
    evaluation = evaluate(runtime, writing([("a",)] * 4), CompletionNLL())
    assert (evaluation.predicted, evaluation.right) == ((), ())
    assert evaluation.metrics.shares == {}


def test_the_names_of_shares() -> None:
    assert Metrics(1.0, 0.5, 2).shares == {"accuracy": 0.5}
    assert Metrics(1.0, None, 2, exact_match=0.0, f1=0.25).shares == {"exact match": 0.0, "F1": 0.25}


def test_a_run_is_judged_by_what_it_writes(tmp_path: Path, tiny_model_folder: Path) -> None:
    rows = [
        {"text": f"{start} {noun} {verb}", "word": "fine", "right": ["fine", "lovely"]}
        for start in ("the", "a")
        for noun in ("film", "plot", "cast")
        for verb in ("is", "was")
    ]
    for name, part in (("train", rows[:8]), ("validation", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = {
        "train": str(tmp_path / "train.jsonl"),
        "validation": str(tmp_path / "validation.jsonl"),
        "prompt": "{text}",
        "completion": " {word}\n",
        "answers": "right",
    }
    table = {
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_model_folder), "dtype": "float32", "device": "cpu"},
        "data": data,
        "method": {"lr": 3e-4},
        "train": {"steps": 100, "batch_size": 4, "eval_every": 100},
        "runtime": {"threads": 1},
    }
    summary = start(parse(table), SilentReporter())
    # Every row has the same answer, so a few dozen steps teach it; what comes after it was not learnt.
    assert summary.first.f1 is not None
    assert summary.last.f1 is not None
    assert summary.first.f1 < summary.last.f1 <= 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = [record for record in map(json.loads, lines) if record["kind"] == "eval"][-1]
    assert (last["f1"], last["exact_match"]) == (summary.last.f1, summary.last.exact_match)
    assert evaluate_run(tmp_path / "run") == summary.last
