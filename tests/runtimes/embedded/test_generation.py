"""Generation of the wrapped model against transformers' own on what it exports."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from zotune.optimizer import Method, Optimizer
from zotune.protocol import CLEAN
from zotune.runtimes.embedded import EmbeddedRuntime, attention
from zotune.testing import tiny
from zotune.testing.conformance import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = EmbeddedRuntime(tiny.model("llama"), Method())


def prompts(count: int = 8, longest: int = 24) -> list[tuple[int, ...]]:
    """Random prompts in no order of length, one of them twice, one of a single token."""
    draw = random.Random(5)
    made = [tuple(draw.randrange(4, tiny.VOCABULARY) for _ in range(draw.randint(2, longest))) for _ in range(count)]
    return [*made, (8,), made[0]]


def talkative(family: str) -> Any:
    """A tiny model that does not only repeat the last token, as Gemma's large tied embedding makes it do."""
    model = tiny.model(family)
    if family.startswith("gemma"):
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(0.03)
    return model


def moved(family: str, method: Method, **options: Any) -> EmbeddedRuntime:
    """A runtime after some steps that change what is generated, in the middle of a window."""
    runtime, optimizer = EmbeddedRuntime(talkative(family), method, **options), Optimizer(method, 4)
    for step in range(4):
        runtime.apply(optimizer.update(step, (30.0,)))
    return runtime


def plain(model: Any, prompt: tuple[int, ...], new: int, stop: frozenset[int] = frozenset()) -> tuple[int, ...]:
    """What transformers generates, with its own cache and attention, one prompt at a time."""
    ids = torch.tensor([prompt])
    ends: Any = sorted(stop) or None
    model.generation_config.eos_token_id = ends
    mask = torch.ones_like(ids)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return tuple(written[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_tokens_are_those_of_the_exported_model(family: str, tmp_path: Path) -> None:
    runtime = moved(family, METHODS["all"])
    free = runtime.generate(prompts(), max_new_tokens=20)
    stop = frozenset(tokens[3] for tokens in free[::2])
    written = runtime.generate(prompts(), max_new_tokens=20, stop=stop)
    assert len({len(tokens) for tokens in written}) > 1, "rows must end at different times"
    runtime.export(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert free == [plain(model, prompt, 20) for prompt in prompts()]
    assert written == [plain(model, prompt, 20, stop) for prompt in prompts()]
    before = EmbeddedRuntime(talkative(family), METHODS["all"])
    assert free != before.generate(prompts(), max_new_tokens=20), "the steps must show"


@pytest.mark.parametrize("method", ["linear", "momentum", "decay", "dense"])
def test_every_method_generates_with_what_it_has_learnt(method: str, tmp_path: Path) -> None:
    runtime = moved("llama-tied", METHODS[method])
    written = runtime.generate(prompts(), max_new_tokens=8)
    runtime.export(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert written == [plain(model, prompt, 8) for prompt in prompts()]


def test_lora_matrices_take_part() -> None:
    pytest.importorskip("peft")
    runtime = moved("llama", METHODS["lora"])
    written = runtime.generate(prompts(), max_new_tokens=8)
    runtime.close()
    assert written == [plain(runtime.model, prompt, 8) for prompt in prompts()]
    assert written != EmbeddedRuntime(tiny.model("llama"), METHODS["lora"]).generate(prompts(), max_new_tokens=8)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.lists(st.integers(0, 9), min_size=1, max_size=6), max_tokens=st.sampled_from([1, 60, 16384]))
def test_a_row_does_not_depend_on_its_company(chosen: list[int], max_tokens: int) -> None:
    alone = {i: LLAMA.generate([prompts()[i]], max_new_tokens=6, stop={14})[0] for i in set(chosen)}
    LLAMA.max_tokens = max_tokens
    assert LLAMA.generate([prompts()[i] for i in chosen], max_new_tokens=6, stop={14}) == [alone[i] for i in chosen]


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_a_row_ends_where_the_context_does(family: str) -> None:
    runtime = EmbeddedRuntime(tiny.model(family), Method())
    near = [tuple(range(4, 4 + length)) for length in (tiny.CONTEXT, tiny.CONTEXT - 3, 10)]
    written = runtime.generate(near, max_new_tokens=8)
    assert [len(tokens) for tokens in written] == [1, 4, 8]
    assert written[1][:1] == runtime.generate(near, max_new_tokens=1)[1]


def test_no_prompts_give_nothing() -> None:
    assert LLAMA.generate([], max_new_tokens=5) == []


def test_scores_before_and_after_are_the_same_bits() -> None:
    runtime, rows = moved("qwen3", METHODS["all"]), tiny.rows("mixed", 5)
    before = runtime.score([CLEAN], rows)
    runtime.generate(prompts(), max_new_tokens=3)
    np.testing.assert_array_equal(runtime.score([CLEAN], rows), before)


def test_a_failure_leaves_the_runtime_usable() -> None:
    runtime, rows = EmbeddedRuntime(tiny.model("llama"), Method()), tiny.rows("mixed", 3)
    before = runtime.score([CLEAN], rows)
    with pytest.raises(IndexError):
        runtime.generate([(tiny.VOCABULARY,)], max_new_tokens=3)
    assert runtime.model.config._attn_implementation == attention.NAME
    np.testing.assert_array_equal(runtime.score([CLEAN], rows), before)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sixteen_bits(family: str) -> None:
    model = tiny.model(family, torch.bfloat16)
    (first, *_), *_ = EmbeddedRuntime(model, Method()).generate([(8, 9, 10)], max_new_tokens=5)
    assert first == plain(tiny.model(family), (8, 9, 10), 1)[0]
