import sys

import numpy as np
import pytest
import torch
from torch import nn

from zotune import presets
from zotune.config import MethodConfig
from zotune.errors import ModelError
from zotune.objectives import CandidateCrossEntropy
from zotune.optimizer import Method, Optimizer
from zotune.protocol import CLEAN
from zotune.rows import Example
from zotune.runtimes.embedded import EmbeddedRuntime, lora
from zotune.testing import tiny
from zotune.testing.oracle import DenseOracle

ROWS = tiny.rows("single", 8, seed=3)
FAMILIES = ["llama", "gpt2", "opt"]


def method(**values: float) -> Method:
    return presets.resolve(MethodConfig(preset="mezo-lora", **values))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_preset_tunes_lora_matrices_alone_and_starts_at_the_base_model(family: str) -> None:
    pytest.importorskip("peft")
    base = DenseOracle(tiny.model(family), ()).score(ROWS)
    model = tiny.model(family)
    runtime = EmbeddedRuntime(model, method(lora_rank=5, lora_alpha=3))  # type: ignore[arg-type]
    sites = runtime.layout.sites
    projections = 1 if family == "gpt2" else 2
    assert len(sites) == 2 * projections * model.config.num_hidden_layers  # type: ignore[union-attr, operator]
    assert all(".lora_" in site.name and 5 in site.shape for site in sites)
    np.testing.assert_allclose(runtime.score([CLEAN], ROWS)[0], base, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss_and_leaves_the_base_weights_alone(family: str) -> None:
    pytest.importorskip("peft")
    model = tiny.model(family)
    before = {name: parameter.detach().clone() for name, parameter in tiny.model(family).named_parameters()}
    chosen = method(lr=1e-2)
    runtime, optimizer = EmbeddedRuntime(model, chosen), Optimizer(chosen, 60)  # type: ignore[arg-type]
    examples, objective = [Example(row, gold=number % 2) for number, row in enumerate(ROWS)], CandidateCrossEntropy()

    def losses(probes: object) -> list[float]:
        return objective.losses(runtime.score(probes, ROWS), examples).mean(1).tolist()  # type: ignore[arg-type]

    first = losses([CLEAN])[0]
    for step in range(60):
        proposal = optimizer.ask(step)
        runtime.apply(optimizer.tell(proposal, losses(proposal.probes)))
    assert losses([CLEAN])[0] < first / 2
    after = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(after[name], parameter) for name, parameter in before.items())


def test_the_fresh_matrices_follow_the_seed_and_nothing_else() -> None:
    pytest.importorskip("peft")

    def matrices(seed: int) -> dict[str, torch.Tensor]:
        model = tiny.model("llama")
        lora.add(model, 4, 16.0, seed)  # type: ignore[arg-type]
        return {name: parameter.detach() for name, parameter in model.named_parameters() if ".lora_" in name}

    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again, other = matrices(1), matrices(1), matrices(2)
    assert torch.equal(torch.rand(1), expected), "the caller's generator was moved"
    for name, matrix in first.items():
        assert torch.equal(matrix, again[name])
        assert torch.equal(matrix, other[name]) == (".lora_B" in name)
        assert bool(matrix.any()) == (".lora_A" in name)


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'zotune\[peft\]'"):
        EmbeddedRuntime(tiny.model("llama"), method())  # type: ignore[arg-type]


def test_a_model_without_such_projections_is_refused() -> None:
    pytest.importorskip("peft")
    with pytest.raises(ModelError, match=r"Sequential has no query and value projections.*q_proj"):
        lora.add(nn.Sequential(nn.Linear(2, 2)), 8, 16.0, seed=0)  # type: ignore[arg-type]
