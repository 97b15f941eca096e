"""Linear layers of one input are one product, and nothing else tells."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from zotune.optimizer import Method
from zotune.protocol import CLEAN, DirectionKey, Probe, Update
from zotune.runtimes.embedded import EmbeddedRuntime, siblings
from zotune.runtimes.embedded.modules import TunedLinear
from zotune.runtimes.sites import decoder_layers
from zotune.testing import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

KEY = DirectionKey(0, 0, 0)
PROBES = [CLEAN, Probe(KEY, 1, 0.1), Probe(KEY, -1, 0.1)]
ROWS = tiny.rows("mixed", 5, seed=1)
ATTENTION, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def names(model: Any) -> list[tuple[str, ...]]:
    of = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    return [tuple(of[layer] for layer in group.layers) for group in siblings.find(model)]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("opt", [ATTENTION] * 2),
        ("gpt2", []),
        ("llama", [ATTENTION, GATED] * 2),
        ("qwen3", [ATTENTION, GATED] * 2),
        ("gemma2", [ATTENTION, GATED] * 2),
        ("mixtral", [ATTENTION] * 2),
        ("qwen2-moe", [ATTENTION, GATED] * 2),
        ("llava", [ATTENTION, GATED] * 2),
    ],
)
def test_layers_of_one_input_are_found(family: str, expected: list[tuple[str, ...]]) -> None:
    assert names(tiny.model(family)) == expected


def test_layers_that_share_a_weight_or_are_unlike_stay_alone() -> None:
    model = tiny.model("llama")
    first, second = decoder_layers(model)
    first.mlp.up_proj.weight = second.mlp.up_proj.weight
    second.self_attn.v_proj = nn.Linear(32, 16, bias=True)
    assert names(model) == [ATTENTION]
    second.self_attn = first.self_attn
    assert names(model) == []


def test_a_model_that_cannot_be_tried_has_none() -> None:
    model = tiny.model("llama")
    decoder_layers(model)[0].mlp.down_proj = nn.Linear(3, 32)
    assert names(model) == []
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["opt", "llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("method", [Method(), Method(scope="linear"), Method(weight_decay=0.5)], ids=str)
def test_together_gives_what_one_by_one_gives(family: str, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    together = EmbeddedRuntime(tiny.model(family), method)
    monkeypatch.setattr(siblings, "find", lambda model, room: [])
    alone = EmbeddedRuntime(tiny.model(family), method)
    assert together.fingerprint == alone.fingerprint
    for runtime in (together, alone):
        runtime.apply(Update(0, 0, ((KEY, 0.5),), 0.1, closes_window=False))
    np.testing.assert_allclose(together.score(PROBES, ROWS), alone.score(PROBES, ROWS), rtol=1e-5, atol=1e-5)
    for runtime in (together, alone):
        runtime.apply(Update(1, 0, ((DirectionKey(0, 1, 0), 0.5),), 0.1, closes_window=True))
    for name, tensor in alone.state().items():
        assert torch.equal(together.state()[name], tensor), name


def test_one_product_is_computed_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = EmbeddedRuntime(tiny.model("llama"), Method())
    widths: list[int] = []
    computed = TunedLinear.__call__

    def counted(self: TunedLinear, x: Tensor) -> Tensor:
        widths.append(len(self.weight))
        return computed(self, x)

    monkeypatch.setattr(TunedLinear, "__call__", counted)
    runtime.score(PROBES, ROWS)
    assert widths == [32 + 16 + 16, 32, 48 + 48, 32] * 2


def test_a_layer_that_is_given_another_input_answers_that() -> None:
    runtime = EmbeddedRuntime(tiny.model("llama"), Method())
    runtime.score([CLEAN], ROWS)
    runtime._shape.blocks = 1
    attention = decoder_layers(runtime.model)[0].self_attn
    x, other = torch.randn(2, 1, 3, 32)
    with torch.inference_mode():
        for layer, given in ((attention.q_proj, x), (attention.k_proj, other), (attention.v_proj, x)):
            expected = given @ layer.weight.T
            torch.testing.assert_close(layer(given), expected)


def test_weights_are_stored_once_and_a_model_stays_a_model(tmp_path: Path) -> None:
    model = tiny.model("llama").to(torch.bfloat16)
    before = copy.deepcopy(model).state_dict()
    runtime = EmbeddedRuntime(model, Method(scope="last-layers"))
    attention = decoder_layers(model)[0].self_attn
    storages = {getattr(attention, name).weight.untyped_storage().data_ptr() for name in ATTENTION}
    assert len(storages) == 1
    assert attention.q_proj.weight.untyped_storage().nbytes() == 2 * 32 * (32 + 16 + 16)
    runtime.close()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for state in (model.state_dict(), copy.deepcopy(model).state_dict(), loaded.state_dict()):
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("decay", [0.0, 300.0])
@pytest.mark.parametrize(("family", "name"), [("llama", "mlp.down_proj"), ("opt", "fc2")])
def test_a_product_is_rounded_once_in_16_bits(
    monkeypatch: pytest.MonkeyPatch, family: str, name: str, decay: float
) -> None:
    monkeypatch.setattr("zotune.runtimes.embedded.modules.product_dtype", lambda dtype, device: dtype)
    monkeypatch.setattr("zotune.runtimes.embedded.runtime.product_dtype", lambda dtype, device: dtype)
    method = Method(eps=0.01, weight_decay=decay)
    runtime = EmbeddedRuntime(tiny.model(family).to(torch.bfloat16), method)
    layer = decoder_layers(runtime.model)[0].get_submodule(name)
    # Decay alone: what is left of the weight is no number that bfloat16 holds.
    runtime.apply(Update(0, 0, ((KEY, 0.0),), 1e-3, closes_window=False))
    runtime.score([Probe(KEY, 1, 0.01)], ROWS)
    x = torch.randn(1, 200, 48).bfloat16()
    matrix = layer.forward.matrix
    with torch.inference_mode():
        got = layer(x)
        shown = matrix.shown.shift[0].bfloat16().double() @ matrix.v.T.bfloat16().double()
        exact = x.double() @ (layer.weight.double() * (1 - 1e-3 * decay) + shown).T
        if layer.bias is not None:
            exact += layer.bias.double() + matrix.bias.shift[0].bfloat16().double()
    best = (exact.bfloat16().double() - exact).abs().mean()
    assert (got.double() - exact).abs().mean() < 1.1 * best
