"""Siblings: linear layers that take the same input, such as queries, keys and values, computed as one product.

Which they are is found by letting the model run. Their weights are stored one below the other, perhaps with room for
factors beside them, and each layer's parameters are views of that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zotune.runtimes.embedded import heap
from zotune.runtimes.embedded.modules import Shape, TunedLinear
from zotune.runtimes.sites import decays, is_routed
from zotune.runtimes.spaces.appended import AppendedProduct
from zotune.runtimes.spaces.projection import Projection
from zotune.runtimes.spaces.skinny import SkinnyProduct

_FREED = 2**24
"""Bytes of weights that may lie free before they are given back."""

Room = Callable[[Sequence[nn.Linear], Sequence[str]], int]
"""Columns of room for linear layers of these names that take the same input."""


class Siblings:
    """Linear layers of one input, in the order in which they are called.

    Args:
        layers: Whose weights, and biases if any, become views of what is stored together; one alone if it has room.
        room: Columns to store beside the weights for factors.

    Attributes:
        layers: The same.
        room: The same.
    """

    def __init__(self, layers: Sequence[nn.Linear], room: int = 0) -> None:
        self.layers, self.room = tuple(layers), room
        self._stored = _with_room([layer.weight for layer in layers], room)
        self._bias = None if layers[0].bias is None else _together([layer.bias for layer in layers])
        self._widths = [layer.out_features for layer in layers]
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def wrap(self, shape: Shape, directions: int) -> None:
        """Let layers that `zotune.runtimes.embedded.modules.wrap` wrapped one by one be one product.

        Args:
            shape: Shared with the runtime.
            directions: Most that the blocks of a pack may see, where there is room for factors.
        """
        alone: list[Any] = [layer.forward for layer in self.layers]
        tuned = [each.matrix for each in alone if each.matrix is not None]
        assert len(tuned) in (0, len(alone)), "no scope parts siblings"
        product: Projection | None = None
        if tuned:
            product = AppendedProduct(tuned, self._stored, directions) if self.room else SkinnyProduct(tuned)
            product.join()
        weight = self._stored[:, : self.layers[0].in_features]
        self._joint = TunedLinear(weight, self._bias, product, None, shape)
        for at, layer in enumerate(self.layers):
            layer.__dict__["forward"] = self._joint if len(self.layers) == 1 else partial(self._output, at)

    def close(self) -> None:
        """Give layers that have room beside their weights weights without it."""
        if self.room:
            _with_room([layer.weight for layer in self.layers], 0)

    def _output(self, at: int, x: Tensor) -> Tensor:
        """The output of one layer, ``(..., out)``; the first that is called computes those of all."""
        if x is not self._input:
            self._input, self._outputs = x, self._joint(x).split(self._widths, -1)
        y = self._outputs[at]
        if at == len(self.layers) - 1:
            self._input, self._outputs = None, ()
        return y


def find(model: PreTrainedModel, room: Room = lambda layers, names: 0) -> list[Siblings]:
    """The siblings of a model that is not wrapped yet, found by letting it read two tokens.

    Layers of experts, which do not see every token, and layers that share a weight or are called more than once are
    none.

    Args:
        model: Any causal language model.
        room: How many columns to store beside the weights of layers with these names; a layer with some is taken
            even where it is alone.
    """
    calls, names = _called_in_turn(model), {module: name for name, module in model.named_modules()}
    often = Counter(id(layer) for group in calls for layer in group)
    owners = Counter(id(own) for each in model.modules() for own in each.parameters(recurse=False))

    def fits(layer: nn.Linear) -> bool:
        return often[id(layer)] == 1 and all(owners[id(own)] == 1 for own in layer.parameters())

    def kind(layer: nn.Linear) -> Any:
        return layer.weight.dtype, layer.weight.device, layer.bias is None, decays(names[layer])

    groups = [[layer for layer in group if fits(layer)] for group in calls]
    alike = [group for group in groups if len(set(map(kind, group))) == 1]
    roomy = [(group, room(group, [names[layer] for layer in group])) for group in alike]
    return list(_stored((group, columns) for group, columns in roomy if columns or len(group) > 1))


def _stored(groups: Iterable[tuple[list[nn.Linear], int]]) -> Iterator[Siblings]:
    """Store the layers of each group together, without keeping more than a little of what that frees."""
    freed = 0
    for group, columns in groups:
        freed += sum(layer.weight.nbytes for layer in group)
        yield Siblings(group, columns)
        if freed > _FREED:
            heap.give_back()
            freed = 0


def _called_in_turn(model: PreTrainedModel) -> list[list[nn.Linear]]:
    """The linear layers in the order of their calls; those that follow each other with the same input together."""
    head, last = model.get_output_embeddings(), None
    calls: list[list[nn.Linear]] = []

    def called(layer: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal last
        if args[0] is not last:
            calls.append([])
        # Kept, so that no other tensor can take its place. A layer's input is never written to: training needs it.
        last = args[0]
        calls[-1].append(layer)

    linear = [
        each
        for name, each in model.named_modules()
        if type(each) is nn.Linear and each is not head and not is_routed(name)
    ]
    hooks = [layer.register_forward_pre_hook(called) for layer in linear]
    tokens = torch.arange(2, device=model.device).unsqueeze(0)
    try:
        with torch.no_grad():
            model(input_ids=tokens, position_ids=tokens, use_cache=False, logits_to_keep=1)
    except Exception:  # Whatever a foreign model raises where it is called unlike it will be: every layer by itself.
        return []
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _with_room(weights: Sequence[Tensor], room: int) -> Tensor:
    """What weights hold, one below the other, with columns of zeros beside them; they become views of it."""
    inputs = weights[0].shape[1]
    stored = weights[0].data.new_zeros(sum(map(len, weights)), inputs + room)
    for weight, rows in zip(weights, stored.split([len(each) for each in weights]), strict=True):
        weight.data = rows[:, :inputs].copy_(weight.data)
    return stored


def _together(biases: Sequence[Tensor]) -> Tensor:
    """What biases hold, one behind the other; they become views of it."""
    stored = torch.cat([bias.data for bias in biases])
    for bias, part in zip(biases, stored.split([len(each) for each in biases]), strict=True):
        bias.data = part
    return stored
