"""Wrapping the modules that hold sites, and every linear layer.

A module is wrapped by giving the instance another ``forward``; its parameters, names and class stay as they are, and
`unwrap` takes the wrapping off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zotune.errors import ModelError
from zotune.runtimes import norms
from zotune.runtimes.own_forward import own_forward
from zotune.runtimes.precision import product_dtype
from zotune.runtimes.sites import is_linear, is_routed
from zotune.runtimes.spaces.mixture import Lookup, Vector


class Product(Protocol):
    """What a linear layer needs of its matrix, or of all that are one product with it."""

    def stage(self) -> None:
        """Be ready for products in a layer's dtype with all rows, rather than for a head's."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """Product of every block."""
        ...


class Matrix(Product, Protocol):
    """What a wrapped module needs of a matrix site; `LowRankMatrix` and `DenseMatrix` are the two."""

    def carry(self, bias: Vector) -> bool:
        """Offer the layer's bias: whether the product shifts it, too."""
        ...

    def embed(self, lookup: Lookup, weight: Tensor) -> Tensor:
        """Embedding of every block."""
        ...


@dataclass
class Shape:
    """What all wrapped modules must know of the pack in flight.

    Attributes:
        blocks: Number of blocks.
        tokens: Tokens of all blocks together.
        vocabulary: Token ids that the head scores; None for all.
    """

    blocks: int = 1
    tokens: int = 1
    vocabulary: Tensor | None = None

    def token_axis(self, x: Tensor) -> int:
        """Which axis of ``x`` runs over tokens; the last axis is features.

        Per-head norms see ``(1, tokens, heads, width)`` or its transpose. Projections write tokens outermost, so where
        two axes have the right length it is the one with the longer stride.

        Raises:
            ModelError: No axis has the pack's length: a module that picks tokens, such as an expert, is not supported.
        """
        axes = [axis for axis in range(x.dim() - 1) if x.shape[axis] == self.tokens]
        if not axes:
            raise ModelError(
                f"a tuned module saw activations of shape {tuple(x.shape)}, not all {self.tokens} tokens of the batch; "
                "models that route tokens to experts are not supported"
            )
        return max(axes, key=x.stride)


class TunedLinear:
    """Forward of a linear layer: its product runs in the device's best dtype, and its sites show their blocks.

    Args:
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.
        matrix: Shows the weight's blocks; None where it is not tuned.
        shift: Shows the bias's blocks; None where it is not tuned, or the matrix does.
        shape: Of the pack in flight.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, matrix: Product | None, shift: Vector | None, shape: Shape
    ) -> None:
        self.weight, self.bias, self.matrix, self.shift, self.shape = weight, bias, matrix, shift, shape
        self.dtype = product_dtype(self.weight.dtype, self.weight.device.type)
        if self.matrix is not None:
            self.matrix.stage()

    def __call__(self, x: Tensor) -> Tensor:
        """``(1, blocks * tokens, in)`` to ``(1, blocks * tokens, out)``."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        blocks = x.to(self.dtype).view(self.shape.blocks, -1, x.shape[-1])
        weight = self.weight.to(self.dtype)
        y = F.linear(blocks, weight, bias) if self.matrix is None else self.matrix.linear(blocks, weight, bias)
        if self.shift is not None:
            y.add_(self.shift.shift.unsqueeze(1))
        return y.view(*x.shape[:-1], -1).to(x.dtype)


def _uncarried(matrix: Matrix | None, bias: Vector | None) -> Vector | None:
    """A layer's bias, unless the layer's matrix shifts it."""
    return bias if matrix is None or bias is None or not matrix.carry(bias) else None


class TunedHead:
    """Forward of the output head: float32, and only the columns that are asked for."""

    def __init__(self, module: nn.Linear, matrix: Matrix | None, bias: Vector | None, shape: Shape) -> None:
        self.weight = module.weight.data
        self.bias = None if module.bias is None else module.bias.data
        self.matrix, self.shift, self.shape = matrix, _uncarried(matrix, bias), shape

    def __call__(self, x: Tensor) -> Tensor:
        """``(1, blocks * kept, in)`` to float32 ``(1, blocks * kept, columns)``."""
        rows = self.shape.vocabulary
        weight = (self.weight if rows is None else self.weight[rows]).float()
        bias = None if self.bias is None else (self.bias if rows is None else self.bias[rows]).float()
        blocks = x.float().view(self.shape.blocks, -1, x.shape[-1])
        y = F.linear(blocks, weight, bias) if self.matrix is None else self.matrix.linear(blocks, weight, bias, rows)
        if self.shift is not None:
            shift = self.shift.shift if rows is None else self.shift.shift[:, rows]
            y.add_(shift.unsqueeze(1))
        return y.view(*x.shape[:-1], -1)


class TunedEmbedding:
    """Forward of an embedding: the module's own look-up, run on the factors too."""

    def __init__(self, module: nn.Embedding, matrix: Matrix) -> None:
        self.module, self.matrix = module, matrix

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Token or position ids to ``(1, blocks * tokens, width)``."""
        y = self.matrix.embed(lambda table: own_forward(self.module, table)(*args, **kwargs), self.module.weight.data)
        return y.flatten(0, 1).unsqueeze(0)


class TunedNorm:
    """Forward of a normalisation: ``normed(x) * gain_k + bias_k``, with gain and bias in float32."""

    def __init__(self, module: Any, gain: Vector, bias: Vector | None, shape: Shape) -> None:
        self.weight, self.bias = module.weight.data, None if bias is None else module.bias.data
        self.gain, self.shift, self.shape = gain, bias, shape
        self.formula = norms.formula(module)
        self.shown = norms.kernel() if self.weight.is_cuda and self.weight.dtype != torch.float32 else norms.shown
        if self.formula is None:
            self.offset = norms.gain_offset(module)
            self.normed = own_forward(module, torch.full_like(self.weight, 1.0 - self.offset, dtype=torch.float32))

    def __call__(self, x: Tensor) -> Tensor:
        """Any shape with an axis of ``blocks * tokens`` whose last axis is normalised; the same shape."""
        axis = self.shape.token_axis(x)
        spread = [1] * (x.dim() + 1)
        spread[axis], spread[-1] = len(self.gain.shift), x.shape[-1]
        gain, gain_shift = _shown(self.weight, self.gain, spread)
        bias, bias_shift = None, None
        if self.bias is not None and self.shift is not None:
            bias, bias_shift = _shown(self.bias, self.shift, spread)
        affine = gain, gain_shift, bias, bias_shift
        if self.formula is not None:
            known = self.formula
            y = self.shown(self._by_block(x, axis), *affine, known.centred, known.eps, known.offset)
        else:
            y = norms.scaled(self._by_block(self.normed(x.float()), axis), *affine, self.offset).to(x.dtype)
        return y.flatten(axis, axis + 1)

    def _by_block(self, x: Tensor, axis: int) -> Tensor:
        return x.unflatten(axis, (self.shape.blocks, -1))


def _shown(stored: Tensor, vector: Vector, spread: list[int]) -> tuple[Tensor, Tensor]:
    """What decay has left of a gain or bias, ``(n,)``, and what its blocks add, float32, in the shape ``spread``."""
    return stored if vector.keep == 1.0 else stored.float() * vector.keep, vector.shift.view(spread)


def wrap(model: PreTrainedModel, states: Mapping[str, Any], shape: Shape) -> None:
    """Wrap every module that holds a site, and every linear layer.

    An expert keeps its own forward.

    Args:
        model: Whose modules to wrap.
        states: Site states (`LowRankMatrix`, `DenseMatrix`, `Vector`) by parameter name.
        shape: Shared with the runtime, which sets it before each forward.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def state(parameter: Tensor | None) -> Any:
        return None if parameter is None else states.get(names[id(parameter)])

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if is_routed(name):
            continue
        weight, bias = (state(module._parameters.get(part)) for part in ("weight", "bias"))
        if module is head:
            forward: Callable[..., Tensor] | None = TunedHead(module, weight, bias, shape)
        elif is_linear(module):
            stored = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
            own = None if module.bias is None else module.bias.data
            forward = TunedLinear(stored, own, weight, _uncarried(weight, bias), shape)
        elif isinstance(module, nn.Embedding):
            forward = TunedEmbedding(module, weight) if weight is not None else None
        else:
            forward = TunedNorm(module, weight, bias, shape) if weight is not None else None
        if forward is not None:
            module.forward = forward


def unwrap(model: PreTrainedModel) -> None:
    """Give every module its own forward back."""
    for module in model.modules():
        module.__dict__.pop("forward", None)
