"""Mixtures of experts and vision-language models: what of them is tuned, exactly, and what is told to be left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zotune.errors import ModelError
from zotune.models import automatic_class
from zotune.protocol import CLEAN
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.sites import left_out
from zotune.testing import conformance, tiny
from zotune.testing.conformance import METHODS, Case, assert_close
from zotune.testing.oracle import DenseOracle
from zotune.testing.reference import OracleRuntime

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = (
    conformance.check_probes,
    conformance.check_rows,
    conformance.check_cut,
    conformance.check_updates,
    conformance.check_state,
)


@pytest.mark.parametrize("check", [conformance.check_sites, *EXACT, conformance.check_export], ids=lambda c: c.__name__)
@pytest.mark.parametrize("family", tiny.ROUTED)
def test_linear_layers_of_mixtures_of_experts(family: str, check: Callable[[Case], None]) -> None:
    check(Case(EmbeddedRuntime, family, METHODS["linear"]))


@pytest.mark.parametrize("check", EXACT, ids=lambda c: c.__name__)
@pytest.mark.parametrize(("family", "method"), [*((family, "all") for family in tiny.SEEING), ("qwen2-vl", "dense")])
def test_text_models_of_vision_language_models(family: str, method: str, check: Callable[[Case], None]) -> None:
    check(Case(EmbeddedRuntime, family, METHODS[method]))


@pytest.mark.parametrize("family", tiny.SEEING)
def test_nothing_but_the_text_model_and_its_head_is_a_site(family: str) -> None:
    model: Any = tiny.model(family)
    before = {name: value.clone() for name, value in model.named_parameters()}
    runtime = EmbeddedRuntime(model, METHODS["all"])
    names = {site.name for site in runtime.layout.sites}
    decoder = {f"model.language_model.{name}" for name, _ in model.get_decoder().named_parameters()}
    assert names | {"lm_head.weight"} == decoder | {"lm_head.weight"}
    for update in Case(EmbeddedRuntime, family, METHODS["all"]).updates(4):
        runtime.apply(update)
    assert {name for name, value in model.named_parameters() if not torch.equal(value, before[name])} <= names
    (told,) = left_out(model, runtime.layout)
    assert "of no text model, left as they are; among them model.vi" in told


def test_a_model_that_hides_its_text_model_is_refused() -> None:
    model: Any = tiny.model("llava")
    model.get_decoder = lambda: model.model
    with pytest.raises(ModelError, match="cannot tell the text model of LlavaForConditionalGeneration"):
        EmbeddedRuntime(model, METHODS["linear"])


@pytest.mark.parametrize("family", tiny.SEEING)
def test_a_tuned_vision_language_model_is_exported_whole(family: str, tmp_path: Path) -> None:
    runtime = EmbeddedRuntime(tiny.model(family), METHODS["all"])
    for update in Case(EmbeddedRuntime, family, METHODS["all"]).updates(5):
        runtime.apply(update)
    rows = tiny.rows("mixed", 4)
    runtime.export(tmp_path)
    automatic = automatic_class(tiny.config(family))
    exported, found = automatic.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert_close(runtime.score([CLEAN], rows)[0], DenseOracle(exported, ()).score(rows))


@pytest.mark.parametrize("family", tiny.ROUTED)
def test_what_an_expert_holds_is_refused_by_name_or_told(family: str) -> None:
    with pytest.raises(ModelError, match=r"scope 'all' cannot tune \d+ parameters.*mlp\..*Set scope = 'linear'"):
        EmbeddedRuntime(tiny.model(family), METHODS["all"])
    model: Any = tiny.model(family)
    (told,) = left_out(model, EmbeddedRuntime(model, METHODS["linear"]).layout)
    assert "% of the model: matrices but no linear layers that see every token (experts, routers)" in told
    names = {site.name for site in EmbeddedRuntime(tiny.model(family), METHODS["linear"]).layout.sites}
    assert ("model.layers.0.mlp.shared_expert.up_proj.weight" in names) == (family == "qwen2-moe")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["all", "linear", "lora"])
def test_of_an_ordinary_model_there_is_nothing_to_tell(family: str, method: str) -> None:
    model: Any = tiny.model(family)
    assert left_out(model, EmbeddedRuntime(model, METHODS[method]).layout) == []


class Routed(nn.Module):
    """A feed-forward layer of linear experts, as code that comes with a checkpoint may have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y, best = torch.zeros_like(x), self.gate(x).argmax(-1)
        for index, expert in enumerate(self.experts):
            y[best == index] = expert(x[best == index])
        return y


def routed_model() -> Any:
    model: Any = tiny.model("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.model.layers[0].mlp = Routed(32).eval()
    return model


def test_linear_experts_are_left_alone_and_the_rest_is_exact() -> None:
    runtime = EmbeddedRuntime(routed_model(), METHODS["linear"])
    assert not [site.name for site in runtime.layout.sites if ".experts." in site.name]
    reference = OracleRuntime(routed_model(), METHODS["linear"], sites=runtime.layout.sites)
    probes, rows = Case(EmbeddedRuntime, "llama", METHODS["linear"]).probes(directions=2), tiny.rows("mixed", 5)
    assert_close(runtime.score(probes, rows), reference.score(probes, rows))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts\.0\.weight"):
        EmbeddedRuntime(routed_model(), METHODS["all"])
