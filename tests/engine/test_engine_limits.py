"""Rows and models at the limits of an engine."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from engines import HEAD_SIZE
from tiny_checkpoint import write
from transformers import AutoModelForCausalLM, DeepseekV2Config, SmolLM3Config

from zotune.config import RuntimeConfig
from zotune.errors import ModelError
from zotune.optimizer import Method
from zotune.protocol import CLEAN, DirectionKey, Probe, Update
from zotune.rows import Candidate, Row
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.engine import handshake
from zotune.runtimes.engine.internals import Engine
from zotune.runtimes.engine.runtime import EngineRuntime, Work
from zotune.testing import tiny

METHOD = Method(scope="linear", eps=1e-2, lr=1e-3)
RANDOM = np.random.default_rng(0)


def tokens(count: int) -> tuple[int, ...]:
    return tuple(RANDOM.integers(4, tiny.VOCABULARY, count).tolist())


def start(model: Any, folder: Path, work: Work) -> EngineRuntime:
    options = RuntimeConfig(type="vllm")
    return EngineRuntime.start(write(model, folder), model, METHOD, seed=0, options=options, work=work)


def check_against_torch(model: Any, folder: Path) -> None:
    """Scores before and after an update are the embedded runtime's."""
    rows = [Row(tokens(8), (Candidate(tokens(length), tuple(range(length))),)) for length in (1, 4)]
    key = DirectionKey(0, 0, 0)
    probes, update = [CLEAN, Probe(key, 1, METHOD.eps)], Update(0, 0, ((key, 1.0),), 1e-2, True)
    runtime = start(model, folder, Work(step_tokens=64, longest=tiny.CONTEXT, largest=48))
    found = [runtime.score(probes, rows)]
    runtime.apply(update)
    found.append(runtime.score([CLEAN], rows))
    runtime.close()
    embedded = EmbeddedRuntime(model, METHOD)
    np.testing.assert_allclose(found[0], embedded.score(probes, rows), rtol=1e-4)
    embedded.apply(update)
    np.testing.assert_allclose(found[1], embedded.score([CLEAN], rows), rtol=1e-4)


def test_nothing_of_an_engine_is_left_once_it_is_closed(tmp_path: Path) -> None:
    model = tiny.model("llama", head_size=HEAD_SIZE)
    runtime = start(model, tmp_path / "model", Work(step_tokens=64, longest=tiny.CONTEXT, largest=48))
    ours = weakref.ref(runtime.llm.llm_engine.model_executor.driver_worker.worker)
    theirs = weakref.ref(ours().model_runner.get_model())
    # A GPU's memory does not wait for Python to look for cycles.
    gc.disable()
    try:
        runtime.close()
        assert ours() is None
        assert theirs() is None
    finally:
        gc.enable()


def test_a_row_whose_logits_fill_a_forward_is_scored_alone(tmp_path: Path) -> None:
    config = tiny.config("llama", HEAD_SIZE)
    # 128 tokens' worth of memory for every token that is scored.
    config.update({"vocab_size": 1 << 16})
    model = AutoModelForCausalLM.from_config(config)
    rows = [Row(tokens(8), (Candidate(tokens(length), tuple(range(length))),)) for length in (30, 2, 20)]
    runtime = start(model, tmp_path / "model", Work(step_tokens=64, longest=tiny.CONTEXT, largest=48))
    found = runtime.score([CLEAN], rows)
    runtime.close()
    np.testing.assert_allclose(found, EmbeddedRuntime(model, METHOD).score([CLEAN], rows), rtol=1e-4)


def test_writing_ends_where_the_context_does(tmp_path: Path) -> None:
    model = tiny.model("llama", head_size=HEAD_SIZE)
    prompts = [tokens(length) for length in (5, tiny.CONTEXT - 10)]
    # As for prompts of up to the context and 50 tokens to write.
    runtime = start(model, tmp_path / "model", Work(step_tokens=64, longest=tiny.CONTEXT + 50, largest=tiny.CONTEXT))
    found = runtime.generate(prompts, max_new_tokens=50)
    runtime.close()
    expected = EmbeddedRuntime(model, METHOD).generate(prompts, max_new_tokens=50)
    assert found[0] == expected[0]
    assert found[1] == expected[1][: len(found[1])]
    assert len(found[1]) in (10, len(expected[1]))


@pytest.mark.parametrize("first", [False, True], ids=["second runner", "first runner"])
def test_plain_vllm_is_no_replay_of_a_graph_that_zotune_s_layers_were_captured_in(tmp_path: Path, first: bool) -> None:
    model = tiny.model("llama", head_size=HEAD_SIZE)
    runtime = start(model, tmp_path / "model", Work(step_tokens=64, longest=tiny.CONTEXT, largest=tiny.CONTEXT))
    replays: list[bool] = []

    def watch(worker: Any) -> None:
        runner = worker.model_runner
        execute, dispatcher = runner.execute_model, runner.cudagraph_dispatcher
        dispatcher.keys_initialized = True

        # As the second runner of GPUs has it, which leaves graphs out where it takes measure.
        def told(scheduler_output: Any, is_profile: bool = False) -> Any:
            if scheduler_output.total_num_scheduled_tokens:
                replays.append(not is_profile)
            return execute(scheduler_output)

        def untold(scheduler_output: Any) -> Any:
            return told(scheduler_output, not dispatcher.keys_initialized)

        runner.execute_model = untold if first else told
        worker.tuner.engine = Engine(runner)

    runtime.llm.collective_rpc(watch)
    handshake.check(runtime, {}, model)
    runtime.score([CLEAN], [Row(tokens(8), (Candidate(tokens(1), (0,)),))])
    runtime.close()
    assert replays.count(False) == 1
    assert replays[-2:] == [False, True]


def test_layers_that_workers_do_not_share_are_tuned(tmp_path: Path) -> None:
    config = tiny.config("opt", HEAD_SIZE)
    # As in OPT-350m, whose embeddings are narrower than its layers, which two more matrices make up for.
    config.update({"word_embed_proj_dim": 64})
    check_against_torch(AutoModelForCausalLM.from_config(config).eval(), tmp_path / "model")


@pytest.mark.parametrize(
    "family",
    ["qwen2-moe", pytest.param("mixtral", marks=pytest.mark.slow), pytest.param("qwen3-moe", marks=pytest.mark.slow)],
)
def test_what_every_token_sees_of_a_mixture_of_experts_is_tuned(tmp_path: Path, family: str) -> None:
    config = tiny.config(family, HEAD_SIZE)
    # Heads of Qwen 2 are as wide as these make them. It has an expert, and a gate for it, that every token sees.
    config.update({"hidden_size": 4 * HEAD_SIZE})
    torch.manual_seed(0)
    check_against_torch(AutoModelForCausalLM.from_config(config).eval(), tmp_path / "model")


def test_an_attention_that_multiplies_past_a_layer_is_refused(tmp_path: Path) -> None:
    config = DeepseekV2Config(
        vocab_size=tiny.VOCABULARY,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=32,
        # All that vLLM's kernel on a CPU takes.
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=tiny.CONTEXT,
    )
    model = AutoModelForCausalLM.from_config(config)
    work = Work(step_tokens=64, longest=tiny.CONTEXT, largest=48)
    with pytest.raises(ModelError, match=r"2 of 16 sites have no place that zotune knows, among them.*kv_b_proj"):
        start(model, tmp_path / "model", work)


def test_a_model_that_vllm_leaves_to_transformers_is_refused(tmp_path: Path) -> None:
    config = SmolLM3Config(
        vocab_size=tiny.VOCABULARY,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=tiny.CONTEXT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    work = Work(step_tokens=64, longest=tiny.CONTEXT, largest=48)
    with pytest.raises(ModelError, match="no implementation of its own of this model"):
        start(model, tmp_path / "model", work)
