from importlib import import_module
from typing import Any

import pytest
import torch

from zotune.optimizer import Method
from zotune.runtimes.embedded import EmbeddedRuntime, rotary
from zotune.testing import tiny

KNOWN = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3"]
OTHERS = ["glm", "cohere"]


def modeling(family: str) -> Any:
    return import_module(f"transformers.models.{family}.modeling_{family}")


def heads(turned: int = 16, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 4, 7, 16), (2, 2, 7, 16), (2, 7, turned), (2, 7, turned)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("family", KNOWN)
def test_it_is_what_a_model_does(family: str) -> None:
    theirs = modeling(family).apply_rotary_pos_emb
    assert rotary._turns_halves(theirs)
    for ours, expected in zip(rotary.turned(*heads()), theirs(*heads()), strict=True):
        torch.testing.assert_close(ours, expected)


def test_it_turns_the_first_numbers_of_heads_as_phi3_does() -> None:
    given = heads(turned=8)
    for ours, expected in zip(rotary.turned(*given), modeling("phi3").apply_rotary_pos_emb(*given), strict=True):
        torch.testing.assert_close(ours, expected)


def test_heads_may_come_after_tokens() -> None:
    q, k, cos, sin = heads()
    there = rotary.turned(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    for ours, expected in zip(there, rotary.turned(q, k, cos, sin), strict=True):
        assert torch.equal(ours.transpose(1, 2), expected)


def test_sixteen_bits_are_rounded_no_more_than_they_were() -> None:
    given = heads(dtype=torch.bfloat16)
    theirs = modeling("llama").apply_rotary_pos_emb
    exact = theirs(*(each.double() for each in given))
    for ours, rounded, expected in zip(rotary.turned(*given), theirs(*given), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - expected).abs().max() < 1e-5 < (rounded - expected).abs().max()


@pytest.mark.parametrize("family", OTHERS)
def test_another_formula_stays(family: str) -> None:
    assert not rotary._turns_halves(modeling(family).apply_rotary_pos_emb)


def other_arguments(q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None) -> Any:
    return rotary.turned(q, k, cos, sin)


def never(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    raise TypeError("not like this")


def last_numbers(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    rest = q.shape[-1] - cos.shape[-1]
    turned = rotary.turned(q[..., rest:], k[..., rest:], cos, sin, unsqueeze_dim)
    return [torch.cat([x[..., :rest], y], -1) for x, y in zip((q, k), turned, strict=True)]


@pytest.mark.parametrize("function", [other_arguments, never, last_numbers])
def test_a_function_that_cannot_be_tried_or_turns_other_numbers_stays(
    function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not rotary._turns_halves(function)
    monkeypatch.setattr(modeling("llama"), "apply_rotary_pos_emb", function)
    model = tiny.model("llama")
    rotary.wrap(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_runtime_wraps_attention_and_gives_it_back() -> None:
    model = tiny.model("llama")
    attention = model.model.layers[0].self_attn
    runtime = EmbeddedRuntime(model, Method())
    assert attention.forward.__func__.__globals__["apply_rotary_pos_emb"] is rotary.turned
    assert modeling("llama").apply_rotary_pos_emb is not rotary.turned
    runtime.close()
    assert "forward" not in attention.__dict__


def test_attention_may_go_back_to_its_own_before_the_rest() -> None:
    runtime = EmbeddedRuntime(tiny.model("llama"), Method())
    layer = runtime.model.model.layers[0]
    rotary.unwrap(runtime.model)
    assert "forward" not in layer.self_attn.__dict__
    assert "forward" in layer.mlp.down_proj.__dict__
    runtime.close()
