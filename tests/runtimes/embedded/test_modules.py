import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from zotune.errors import ModelError
from zotune.optimizer import Method
from zotune.protocol import CLEAN, DirectionKey, Probe
from zotune.runtimes import norms
from zotune.runtimes.embedded import EmbeddedRuntime, modules
from zotune.runtimes.embedded.modules import Shape, TunedNorm
from zotune.runtimes.sites import find_sites
from zotune.runtimes.spaces.mixture import Vector
from zotune.testing import oracle, tiny
from zotune.testing.oracle import DenseOracle

ROWS = tiny.rows("mixed", 5, seed=1)
LAYER = {
    "opt": r"(self_attn\.(q|k|v|out)_proj|fc1|fc2)",
    "gpt2": r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)",
}
LLAMA_LAYER = r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def model(family: str) -> Any:
    return tiny.model(family)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_is_every_parameter_once_in_their_order_as_out_by_in(family: str) -> None:
    made = model(family)
    found = find_sites(made, "all")
    parameters = dict(made.named_parameters())
    assert [site.name for site in found] == list(parameters)
    for site, weight in found.items():
        parameter = parameters[site.name]
        conv1d = family == "gpt2" and re.search(r"c_(attn|proj|fc)\.weight", site.name)
        assert torch.equal(weight, parameter.T if conv1d else parameter)
        assert site.shape == tuple(weight.shape)
        assert weight.data_ptr() == parameter.data_ptr(), "a site's weight must be the model's own"
        assert site.decays == (not re.search("bias|layer_norm|layernorm", site.name))


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gpt2", "opt", "gemma3"])
def test_a_tied_head_is_one_site_with_the_embedding(family: str) -> None:
    made = model(family)
    embedding = made.get_input_embeddings().weight
    assert made.get_output_embeddings().weight is embedding
    shared = [site for site, weight in find_sites(made, "all").items() if weight.data_ptr() == embedding.data_ptr()]
    assert [site.shape for site in shared] == [(tiny.VOCABULARY, 32)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_linear_is_the_weights_of_the_layers_linear_maps(family: str) -> None:
    names = [site.name for site in find_sites(model(family), "linear")]
    pattern = LAYER.get(family, LLAMA_LAYER)
    assert all(re.search(rf"\.[01]\.{pattern}\.weight$", name) for name in names), names
    assert len(names) == {"opt": 12, "gpt2": 8}.get(family, 14)
    everything = [site.name for site in find_sites(model(family), "all")]
    assert names == [name for name in everything if name in names]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_last_layers_take_turns_beginning_with_the_very_last(family: str) -> None:
    made = model(family)
    sites = tuple(find_sites(made, "last-layers"))
    assert sites == oracle.sites(made, "last-layers")
    assert [site.name for site in sites] == [s.name for s in find_sites(made, "all") if re.search(r"\.[01]\.", s.name)]
    assert all(site.turn == ((0, 2) if ".1." in site.name else (1, 2)) for site in sites)


@pytest.mark.parametrize(
    ("layers", "turns"),
    [(1, {(0, 1): {"0"}}), (4, {(0, 2): {"3"}, (1, 2): {"2"}}), (11, {(0, 2): {"9", "10"}, (1, 2): {"7", "8"}})],
)
def test_a_turn_is_a_fifth_of_the_layers(layers: int, turns: dict[tuple[int, int], set[str]]) -> None:
    config = tiny.config("llama")
    config.num_hidden_layers = layers
    found: dict[tuple[int, int], set[str]] = {}
    for site in find_sites(AutoModelForCausalLM.from_config(config), "last-layers"):
        found.setdefault(site.turn, set()).add(site.name.split(".")[2])
    assert found == turns


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_closing_gives_the_model_back_bit_for_bit(family: str) -> None:
    made = model(family)
    tokens = torch.tensor([[5, 9, 11, 40, 7, 23, 8, 90, 33, 12]])
    before, implementation = made(input_ids=tokens).logits, made.config._attn_implementation
    attributes = {name: set(vars(module)) for name, module in made.named_modules()}
    runtime = EmbeddedRuntime(made, Method(eps=0.1))
    runtime.score([CLEAN, Probe(DirectionKey(0, 0, 0), 1, 0.1)], ROWS)
    runtime.close()
    assert torch.equal(made(input_ids=tokens).logits, before)
    assert made.config._attn_implementation == implementation
    assert {name: set(vars(module)) for name, module in made.named_modules()} == attributes


class Temperature(nn.Module):
    """Not linear in its parameter, which has the name of a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.3, 0.3, 32))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.exp(self.weight)


class NamedTemperature(nn.Module):
    """Not linear in its parameter, which has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.linspace(-0.3, 0.3, 32))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.exp(self.temperature)


class Residual(Temperature):
    """Linear in its gain, but not a product with it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) + x * self.weight


class Leaky(Temperature):
    """Linear in its gain on one side of zero, independent of it on the other: nn.PReLU's structure."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.weight)


class ShiftedFirst(Temperature):
    """Its bias goes in before the gain."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(0.1, 0.2, 32))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bias) * self.weight


class ScaledBias(ShiftedFirst):
    """Its bias is doubled on the way, and may be missing."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if self.bias is None else x * self.weight + 2 * self.bias


class Pair(Temperature):
    """Its output is not a tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x * self.weight, x


class Mixing(Temperature):
    """Its gain acts across the features, which a gain per feature cannot say."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.flip(0)


STRANGE = [Temperature, NamedTemperature, Residual, Leaky, ShiftedFirst, ScaledBias, Mixing]


@pytest.mark.parametrize("strange", STRANGE, ids=lambda cls: cls.__name__)
def test_a_module_that_is_not_known_to_be_exact_is_refused_by_name_and_left_alone_under_linear(
    strange: type[nn.Module],
) -> None:
    made = model("llama")
    made.model.layers[1].post_attention_layernorm = strange()
    (first, *_) = dict(strange().named_parameters())
    name = rf"model\.layers\.1\.post_attention_layernorm\.{first} \({strange.__name__}\)"
    with pytest.raises(ModelError, match=rf"cannot tune {len(list(strange().parameters()))} param.*{name}.*'linear'"):
        EmbeddedRuntime(made, Method(scope="all"))
    expected = DenseOracle(made, ()).score(ROWS)
    runtime = EmbeddedRuntime(made, Method(scope="linear"))
    np.testing.assert_allclose(runtime.score([CLEAN], ROWS)[0], expected, rtol=1e-4)


@pytest.mark.parametrize("strange", [Pair], ids=lambda cls: cls.__name__)
def test_a_module_of_another_signature_is_refused_too(strange: type[nn.Module]) -> None:
    made = model("llama")
    made.model.layers[1].strange = strange()
    with pytest.raises(ModelError, match=r"layers\.1\.strange\.weight"):
        find_sites(made, "all")


def test_a_model_without_parameters_in_scope_is_refused() -> None:
    made = model("gpt2")
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no parameter in scope 'linear'"):
        find_sites(made, "linear", lora=True)


NORMS = [
    (lambda: nn.LayerNorm(16), 0.0),
    (lambda: nn.LayerNorm(16, bias=False), 0.0),
    (lambda: nn.RMSNorm(16, eps=1e-6), 0.0),
    (lambda: LlamaRMSNorm(16), 0.0),
    (lambda: Gemma2RMSNorm(16), 1.0),
    (lambda: Gemma3RMSNorm(16), 1.0),
]


@pytest.mark.parametrize("known", [False, True], ids=["by its forward", "by its formula"])
@pytest.mark.parametrize(("make", "offset"), NORMS)
def test_norms_show_every_block_its_own_gain_and_bias(
    monkeypatch: pytest.MonkeyPatch, make: Any, offset: float, known: bool
) -> None:
    norm, generator = make(), torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.data.add_(torch.randn(16, generator=generator), alpha=0.3)
    blocks, tokens = 3, 4
    shifts = {name: torch.randn(blocks, 16, generator=generator) for name, _ in norm.named_parameters()}
    states = {name: Vector(torch.zeros(16)) for name in shifts}
    for name, state in states.items():
        state.shift = shifts[name]
    x = torch.randn(1, blocks * tokens, 16, generator=generator)
    centred = isinstance(norm, nn.LayerNorm)
    formula = norms.Formula(centred, float(getattr(norm, "variance_epsilon", 0) or norm.eps), offset)
    assert norms.formula(norm) == formula
    assert norms.gain_offset(norm) == offset
    if not known:
        monkeypatch.setattr(norms, "formula", lambda module: None)
    tuned = TunedNorm(norm, states["weight"], states.get("bias"), Shape(blocks, blocks * tokens))
    assert tuned.formula == (formula if known else None)
    before = x.clone()
    output = tuned(x)
    assert torch.equal(x, before)
    for block in range(blocks):
        moved = copy.deepcopy(norm)
        for name, parameter in moved.named_parameters():
            parameter.data.add_(shifts[name][block])
        part = slice(block * tokens, (block + 1) * tokens)
        torch.testing.assert_close(output[:, part], moved(x[:, part]).detach())


def test_a_norm_of_another_kind_has_no_formula() -> None:
    class Rooted(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sign() * super().forward(x).abs().sqrt()

    for norm in (Rooted(16), nn.RMSNorm(16, eps=None), nn.BatchNorm1d(16)):
        norm.eval()
        assert norms.formula(norm) is None  # type: ignore[arg-type]


def test_per_head_norms_find_the_axis_of_the_tokens() -> None:
    # As many tokens as heads, seen as projections write them and transposed: strides tell the axes apart.
    written = torch.zeros(1, 4, 4, 8)
    assert Shape(tokens=4).token_axis(written) == 1
    assert Shape(tokens=4).token_axis(written.transpose(1, 2)) == 2
    assert Shape(tokens=6).token_axis(torch.zeros(1, 4, 6, 8)) == 2


def test_a_module_that_sees_some_of_the_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match=r"shape \(1, 5, 8\), not all 6 tokens.*experts"):
        Shape(tokens=6).token_axis(torch.zeros(1, 5, 8))


def test_unwrap_leaves_an_unwrapped_model_as_it_is() -> None:
    made = model("opt")
    before = made(input_ids=torch.tensor([[4, 5, 6]])).logits
    modules.unwrap(made)
    assert torch.equal(made(input_ids=torch.tensor([[4, 5, 6]])).logits, before)
