"""The crown: above the last layer's attention nothing mixes tokens, so only those that are scored need it.

The feed-forward part of the last layer runs on the scored tokens of every block. The others get zeros, on which no
result depends: the head reads scored tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zotune.runtimes.embedded.modules import Shape
from zotune.runtimes.sites import decoder_layers


class Crown:
    """What of a model runs on scored tokens alone.

    Args:
        model: Not wrapped yet. The feed-forward module of its last layer gets another ``forward``, which
            `zotune.runtimes.embedded.modules.unwrap` takes off; where it is no module of its own (OPT) all tokens run.
        shape: Shared with the wrapped modules; its tokens are the scored ones within the crown.
    """

    def __init__(self, model: PreTrainedModel, shape: Shape) -> None:
        self._shape = shape
        self._scored: Tensor | None = None
        for layer in decoder_layers(model)[-1:]:
            for child in layer.children():
                if _is_tokenwise(child):
                    child.forward = self._narrowed(child.forward)

    @contextmanager
    def scoring(self, scored: Tensor) -> Iterator[None]:
        """Inside, only the tokens at these places of all blocks count, int64 ``(n,)``, as many of each block."""
        self._scored = scored
        try:
            yield
        finally:
            self._scored = None

    def _narrowed(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def narrowed(x: Tensor) -> Tensor:
            if self._scored is None:
                return forward(x)
            tokens, self._shape.tokens = self._shape.tokens, len(self._scored)
            y = forward(x[:, self._scored])
            self._shape.tokens = tokens
            return torch.zeros_like(x).index_copy_(1, self._scored, y)

        return narrowed


@torch.no_grad()
def _is_tokenwise(module: nn.Module) -> bool:
    """Whether a module with linear layers in it maps every token by itself, by trying it."""
    inner = [each for each in module.modules() if isinstance(each, nn.Linear | Conv1D)]
    if not inner or module in inner:
        return False
    weight = inner[0].weight
    width = weight.shape[0 if isinstance(inner[0], Conv1D) else 1]
    # Not a straight line: the mean of its tokens would be the one in the middle.
    x = torch.linspace(-1, 2, 3 * width, device=weight.device).exp().view(1, 3, width).to(weight.dtype)
    # Neighbours so large that what a module mixes in is no rounding, even in 16 bits.
    other = x * torch.tensor([-30.0, 1.0, 30.0], device=x.device, dtype=x.dtype).view(1, 3, 1)
    try:
        first, second = module(x), module(other)
    except Exception:  # Whatever a foreign module raises when it is tried: attention wants more than one argument.
        return False
    if not torch.is_tensor(first) or first.shape != x.shape:
        return False
    tolerance = 10 * torch.finfo(weight.dtype).eps
    return torch.allclose(first[:, 1], second[:, 1], rtol=tolerance, atol=tolerance * float(first[:, 1].abs().max()))
