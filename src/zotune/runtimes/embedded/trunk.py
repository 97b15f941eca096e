"""The trunk: layers below the first that is tuned see the same weights under every probe, so they run once for all.

A pack goes into the model as one block. Before the first tuned layer its activations, and before every layer from there
on what transformers hands each of them anew (rotary factors, positions), are repeated, a block per probe. Where sites
take turns, how far the trunk reaches depends on the window.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zotune.layout import Layout, Site, period
from zotune.runtimes.embedded.modules import Shape
from zotune.runtimes.packing import Pack
from zotune.runtimes.sites import decoder_layers


class Trunk:
    """Where a model branches into its probes.

    Args:
        model: Hooks are put on its layers until `close`.
        layout: What is tuned; if any of it lies outside the layers or in the first, there is no trunk.
        shape: Shared with the wrapped modules; its blocks grow from one to as many as there are where the trunk ends.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, shape: Shape) -> None:
        self._shape, self._blocks, self._tokens, self._top = shape, 1, 1, 0
        self._layer_of = _layers_of(model, layout)
        reached = [self._reach(window) for window in range(period(layout.sites))]
        self._hooks: list[Any] = []
        if any(reached):
            branching = list(enumerate(decoder_layers(model)))[min(reached) :]
            for at, layer in branching:
                self._hooks.append(layer.register_forward_pre_hook(partial(self._branch, at), with_kwargs=True))
            self._hooks.append(model.get_decoder().register_forward_hook(self._one_sequence))

    @contextmanager
    def carrying(self, pack: Pack, blocks: int, window: int) -> Iterator[dict[str, Tensor]]:
        """The model's arguments for as many blocks of a pack: one of them if there is a trunk, else all.

        Inside, activations branch where the trunk of the window ends.
        """
        self._top = self._reach(window)
        first = 1 if self._top else blocks
        self._blocks, self._tokens = blocks if self._top else 1, len(pack.tokens)
        self._shape.blocks, self._shape.tokens = first, first * self._tokens
        try:
            yield {
                "input_ids": pack.tokens.repeat(first).unsqueeze(0),
                "position_ids": pack.positions.repeat(first).unsqueeze(0),
            }
        finally:
            self._blocks = 1

    def close(self) -> None:
        """Take the hooks off, so that there is no trunk."""
        self._layer_of = {}
        for hook in self._hooks:
            hook.remove()

    @property
    def branches(self) -> bool:
        """Whether there is a window whose probes share lower layers."""
        return bool(self._hooks)

    def _reach(self, window: int) -> int:
        """Layers below the first that directions of the window move."""
        return min((layer for site, layer in self._layer_of.items() if site.moves(window)), default=0)

    def _branch(self, at: int, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._blocks == 1 or at < self._top:
            return None
        self._shape.blocks, self._shape.tokens = self._blocks, self._blocks * self._tokens
        return self._repeated(args), {name: self._repeated(value) for name, value in kwargs.items()}

    def _one_sequence(self, decoder: nn.Module, args: Any, output: Any) -> None:
        # GPT-2 gives its result the input's length, as if a block were another row of the batch.
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1).unsqueeze(0)

    def _repeated(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._repeated(each) for each in value)
        if torch.is_tensor(value) and value.dim() > 1 and value.shape[:2] == (1, self._tokens):
            return value.repeat(1, self._blocks, *[1] * (value.dim() - 2))
        return value


def _layers_of(model: PreTrainedModel, layout: Layout) -> dict[Site, int]:
    """The number of the layer that holds each site; 0 for one outside the layers, below which nothing can be shared."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {
        names[id(parameter)]: at for at, layer in enumerate(decoder_layers(model)) for parameter in layer.parameters()
    }
    return {site: held.get(site.name, 0) for site in layout.sites}
