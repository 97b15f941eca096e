"""Biases that an engine adds where no layer is; no engine is needed."""

from types import SimpleNamespace

import pytest
import torch

from zotune.errors import ModelError
from zotune.layout import Site
from zotune.optimizer import Method
from zotune.runtimes.engine.layers import LinearLayer, Place, number_from, registered, wrap
from zotune.runtimes.engine.tokens import Part, TokenMix
from zotune.runtimes.engine.tokenwise import TokenSpace

MIX = TokenMix(8, 1, torch.float32, torch.device("cpu"))
WHOLE = slice(None)


def places(module: SimpleNamespace, kind: str, *parameters: str) -> list[Place]:
    shapes = {"weight": (6, 5), "bias": (6,)}
    return [
        Place("layer", module, name, kind, Part(Site(f"layer.{name}", shapes[name]), slice(0, 6), WHOLE))
        for name in parameters
    ]


def space(found: list[Place]) -> TokenSpace:
    return TokenSpace([place.part.site for place in found], Method(rank=2), 0, MIX)


def linear(**more: bool) -> SimpleNamespace:
    return SimpleNamespace(quant_method=None, output_size_per_partition=6, input_size_per_partition=5, **more)


def table() -> SimpleNamespace:
    return SimpleNamespace(weight=torch.zeros(6, 5), forward=None)


@pytest.mark.parametrize(
    "found",
    [
        places(linear(skip_bias_add=True), "linear", "weight", "bias"),
        places(linear(), "linear", "bias"),
        places(table(), "table", "weight", "bias"),
    ],
    ids=["added later", "of a weight that is not tuned", "of the output head"],
)
def test_biases_that_no_layer_adds_are_refused(found: list[Place]) -> None:
    with pytest.raises(ModelError, match=r"layer\.bias where zotune cannot.*scope = 'linear'"):
        wrap(found, space(found))


@pytest.mark.parametrize(
    "found",
    [places(linear(skip_bias_add=True), "linear", "weight"), places(table(), "table", "weight")],
    ids=["linear", "table"],
)
def test_their_weights_are_tuned(found: list[Place]) -> None:
    (layer,) = wrap(found, space(found))
    assert [part.site.name for each in layer.tuned for part in each.parts] == ["layer.weight"]


def test_compiled_code_of_another_process_finds_layers_under_the_same_numbers() -> None:
    first = registered() + 5
    number_from(first)
    assert LinearLayer("layer", linear()).key == first
    number_from(0)
    assert LinearLayer("layer", linear()).key == first + 1, "a number is given once"
