"""The trunk: layers below the first that is tuned see the same weights under every probe, so they run once for all.

A pack goes into the model as one block. Before the first tuned layer its activations, and before every layer from there
on what transformers hands each of them anew (rotary factors, positions), are repeated, a block per probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zotune.layout import Layout
from zotune.runtimes.modules import Shape, decoder_layers
from zotune.runtimes.packing import Pack


class Trunk:
    """Where a model branches into its probes.

    Args:
        model: Hooks are put on its layers until `close`.
        layout: What is tuned; if any of it lies outside the layers or in the first, there is no trunk.
        shape: Shared with the wrapped modules; its blocks grow from one to as many as there are where the trunk ends.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, shape: Shape) -> None:
        self._shape, self._blocks, self._tokens = shape, 1, 1
        branches = _above_the_trunk(model, layout)
        self._hooks = [layer.register_forward_pre_hook(self._branch, with_kwargs=True) for layer in branches]
        if branches:
            self._hooks.append(model.get_decoder().register_forward_hook(self._one_sequence))

    @contextmanager
    def carrying(self, pack: Pack, blocks: int) -> Iterator[dict[str, Tensor]]:
        """The model's arguments for as many blocks of a pack: one of them if there is a trunk, else all.

        Inside, activations branch where the trunk ends.
        """
        first = 1 if self._hooks else blocks
        self._blocks, self._tokens = blocks, len(pack.tokens)
        self._shape.blocks, self._shape.tokens = first, first * self._tokens
        try:
            yield {
                "input_ids": pack.tokens.repeat(first).unsqueeze(0),
                "position_ids": pack.positions.repeat(first).unsqueeze(0),
            }
        finally:
            self._blocks = 1

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _branch(self, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._blocks == 1:
            return None
        self._shape.blocks, self._shape.tokens = self._blocks, self._blocks * self._tokens
        return self._repeated(args), {name: self._repeated(value) for name, value in kwargs.items()}

    def _one_sequence(self, decoder: nn.Module, args: Any, output: Any) -> None:
        # GPT-2 gives its result the input's length, as if a block were another row of the batch.
        if self._blocks > 1:
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1).unsqueeze(0)

    def _repeated(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._repeated(each) for each in value)
        if torch.is_tensor(value) and value.dim() > 1 and value.shape[:2] == (1, self._tokens):
            return value.repeat(1, self._blocks, *[1] * (value.dim() - 2))
        return value


def _above_the_trunk(model: PreTrainedModel, layout: Layout) -> list[nn.Module]:
    """The layers from the first that holds a site; none if that is all of them, or a site lies outside the layers."""
    layers = decoder_layers(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [{names[id(parameter)] for parameter in layer.parameters()} for layer in layers]
    tuned = {site.name for site in layout.sites}
    if not tuned <= {name for own in held for name in own}:
        return []
    first = next(at for at, own in enumerate(held) if own & tuned)
    return layers[first:] if first else []
