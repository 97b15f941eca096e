"""Models that cannot read packs are refused; what others have that is unusual is computed as the oracle does."""

import copy
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from zotune import models
from zotune.errors import ModelError
from zotune.optimizer import Method
from zotune.protocol import CLEAN, DirectionKey, Probe
from zotune.runtimes.embedded import EmbeddedRuntime, trial
from zotune.runtimes.embedded.crown import _is_tokenwise
from zotune.runtimes.sites import find_sites
from zotune.runtimes.spaces.lowrank import LowRankSpace
from zotune.runtimes.spaces.stage import Stage
from zotune.testing import oracle, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

KEY = DirectionKey(0, 0, 0)
PROBES = [CLEAN, Probe(KEY, 1, 1e-2), Probe(KEY, -1, 1e-2)]
PLAIN: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 8}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
SCALED = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


def make(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    config = CONFIG_MAPPING[kind](vocab_size=96, attn_implementation="eager", **special, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            tiny._randomise(parameter)
    return model.to(dtype).eval()


def assert_exact(model: Any, method: Method, kind: Any = "mixed", normalised: bool = True) -> EmbeddedRuntime:
    """Scores are the oracle's, up to a constant of each row where they are not normalised."""
    rows, plain = tiny.rows(kind, 6, seed=3), copy.deepcopy(model)
    runtime = EmbeddedRuntime(model, method)
    reference = oracle.DenseOracle(plain, runtime.layout.sites)
    dense = oracle.directions(runtime.layout.sites, method).dense(KEY)
    expected = np.stack([reference.score(rows), *(reference.score(rows, dense, sign * 1e-2) for sign in (1, -1))])
    found = runtime.score(PROBES, rows, normalised=normalised)
    if not normalised:
        found, expected = (each.reshape(3, len(rows), -1) for each in (found, expected))
        found, expected = found - found[:, :, :1], expected - expected[:, :, :1]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    return runtime


def test_a_soft_cap_counts_although_the_attention_of_a_loaded_checkpoint_leaves_it_out(tmp_path: Path) -> None:
    made: Any = tiny.model("gemma2")
    if not made._supports_sdpa:
        pytest.skip("newer transformers have no attention for it that leaves out the cap")
    made.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = model.config._attn_implementation
    assert before != "eager"
    assert_exact(model, Method()).close()
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "attention is its own"),
        ("gptj", {**OLD, "rotary_dim": 4}, "attention is its own"),
        ("mamba", MAMBA, "depends on the row before it"),
        ("mamba2", {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1}, "depends on the row before it"),
        ("lfm2", {**GROUPED, "block_ff_dim": 48, "layer_types": ["conv", "full_attention"]}, "the row before it"),
        ("doge", GROUPED, "not those of its own forward"),
    ],
)
def test_a_model_whose_tokens_meet_otherwise_is_refused(kind: str, options: dict[str, Any], why: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        if (kind, dtype) == ("doge", torch.bfloat16):
            continue
        model = make(kind, dtype, **options)
        if kind == "gptj" and model._supports_attention_backend:
            pytest.skip("newer transformers let its attention be another one")
        with pytest.raises(ModelError, match=rf"\w+ cannot be tuned on PyTorch: .*{why}.*runtime.type = 'vllm'"):
            EmbeddedRuntime(model, Method(scope="linear"))
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert model.config._attn_implementation == "eager"


def test_what_packs_do_not_support_is_said_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def sinks(*args: Any) -> Any:
        raise ModelError("attention sinks are not supported")

    monkeypatch.setattr("zotune.runtimes.embedded.attention._attend", sinks)
    with pytest.raises(ModelError, match=r"^attention sinks are not supported"):
        EmbeddedRuntime(tiny.model("llama"), Method())


def test_a_model_that_wants_more_than_tokens_is_compared_with_itself_alone() -> None:
    model = tiny.model("llama")
    forward = model.forward
    model.forward = lambda *args, more=None, **kwargs: forward(*args, **kwargs) if more else None
    assert trial._own_scores(model, tiny.rows("single", 1)[0]) is None


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_a_tuned_head_with_a_bias(kind: str, normalised: bool) -> None:
    assert_exact(make("phi", **PLAIN), Method(), kind, normalised or kind == "multi")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt_bigcode", OLD | {"n_layer": 5}),
        (
            "gemma4_text",
            GROUPED
            | {
                "num_hidden_layers": 6,
                "layer_types": ["sliding_attention", "full_attention"] * 3,
                "sliding_window": 8,
                "global_head_dim": 8,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 96,
                "num_kv_shared_layers": 2,
            },
        ),
    ],
)
def test_a_model_that_cannot_branch_is_exact_and_has_no_trunk(kind: str, options: dict[str, Any]) -> None:
    runtime = assert_exact(make(kind, **options), Method(scope="last-layers"))
    if kind == "gemma4_text":
        taken = signature(type(runtime.model.model.layers[0].self_attn).forward).parameters
        if "shared_kv_states" not in taken:
            pytest.skip("in older transformers upper layers take nothing from lower ones that cannot be repeated")
    assert runtime._trunk._reach(0) == 0


def test_a_linear_layer_that_gives_more_than_a_product_is_none() -> None:
    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), x

    class Plain(nn.Linear):
        pass

    model = tiny.model("llama")
    model.model.layers[0].mlp.router = Router(32, 4)
    model.model.layers[0].mlp.plain = Plain(32, 4)
    found = {site.name for site in find_sites(model, "linear")}
    assert "model.layers.0.mlp.plain.weight" in found
    assert "model.layers.0.mlp.router.weight" not in found
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.router.weight \(Router\)"):
        find_sites(model, "all")
    EmbeddedRuntime(model, Method(scope="linear"))
    assert "forward" not in model.model.layers[0].mlp.router.__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_convolution_over_tokens_is_not_tokenwise(dtype: torch.dtype) -> None:
    model = make("lfm2", dtype, **GROUPED, block_ff_dim=48, layer_types=["full_attention", "conv"])
    conv = model.model.layers[1].conv
    assert not _is_tokenwise(conv)
    assert _is_tokenwise(model.model.layers[1].feed_forward)


def test_the_longest_row_is_treated_as_any_shorter_one() -> None:
    scaled = make("phi3", **GROUPED, rope_parameters=SCALED, original_max_position_embeddings=16)
    assert models.context_length(scaled) == 16
    chunked = CONFIG_MAPPING["llama4_text"](attention_chunk_size=8, max_position_embeddings=64)
    assert models.context_length(type("Model", (), {"config": chunked})) == 8
    assert models.context_length(tiny.model("llama")) == 64


def test_directions_are_drawn_once_for_all_parts_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = EmbeddedRuntime(tiny.model("opt"), Method(), max_tokens=32)
    space, shows = runtime.space, []
    assert isinstance(space, LowRankSpace)
    show = Stage.show
    monkeypatch.setattr(Stage, "show", lambda self, *args: shows.append(1) or show(self, *args))
    whole = EmbeddedRuntime(tiny.model("opt"), Method()).score(PROBES, tiny.rows("single", 9))
    shows.clear()
    found = runtime.score(PROBES, tiny.rows("single", 9))
    assert len(shows) == 3, "a part for each probe alone, each cut into several"
    np.testing.assert_allclose(found, whole, rtol=1e-4)
