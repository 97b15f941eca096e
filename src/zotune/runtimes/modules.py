"""Finding a model's sites by module structure, and wrapping the modules that hold them.

A module is wrapped by giving the instance another ``forward``; its parameters, names and class stay as they are, and
`unwrap` takes the wrapping off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zotune.errors import ModelError
from zotune.layout import Layout, Site
from zotune.runtimes import norms
from zotune.runtimes.mixture import Lookup, Vector
from zotune.runtimes.precision import product_dtype

_UNDECAYED = ("bias", "layer_norm", "layernorm")
"""Parts of parameter names that weight decay skips, as in LOZO's and MeZO's code."""


class Product(Protocol):
    """What a linear layer needs of its matrix, or of all that are one product with it."""

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


def find_sites(model: PreTrainedModel, scope: str, *, lora: bool = False) -> dict[Site, Tensor]:
    """The sites to tune and their weights, in the order of ``named_parameters``.

    A weight that is stored transposed (GPT-2) is given as a transposed view, so that all are ``(out, in)``. Of a model
    that sees or hears as well, only the text model and the output head are looked at.

    Args:
        model: Any causal language model.
        scope: Of `zotune.layout.Scope`; ``linear`` leaves out experts as well, which do not see every token.
        lora: Only the LoRA matrices.

    Raises:
        ModelError: A parameter in scope belongs to a module whose structure is not known to be exact, or there is none.
    """
    owners = _owners(model)
    head, text = model.get_output_embeddings(), _text_parameters(model)
    turns = _last_layers(model) if scope == "last-layers" else None
    found: dict[Site, Tensor] = {}
    unknown: list[str] = []
    for name, parameter in model.named_parameters():
        if id(parameter) not in text:
            continue
        owner, routed = owners[id(parameter)], is_routed(name)
        linear = isinstance(owner, nn.Linear | Conv1D) and parameter is owner.weight and not routed
        if lora and not (linear and ".lora_" in name):
            continue
        if scope == "linear" and (not linear or owner is head):
            continue
        if turns is not None and id(parameter) not in turns:
            continue
        if routed or not (_is_plain(owner) or _is_norm(owner)):
            unknown.append(f"{name} ({type(owner).__name__})")
            continue
        weight = parameter.data.T if isinstance(owner, Conv1D) and linear else parameter.data
        turn = Site.turn if turns is None else turns[id(parameter)]
        found[Site(name, tuple(weight.shape), decays(name), turn)] = weight
    if unknown:
        raise ModelError(
            f"scope {scope!r} cannot tune {len(unknown)} parameters exactly, among them {', '.join(unknown[:3])}. "
            "Set scope = 'linear' to tune the linear layers only."
        )
    if not found:
        raise ModelError(f"{type(model).__name__} has no parameter in scope {scope!r}")
    return found


def decays(name: str) -> bool:
    """Whether weight decay applies to a parameter of this name."""
    return not any(part in name for part in _UNDECAYED)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the text model, first to last; none where they are not one list of modules."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = model.get_decoder()
    lists = [] if decoder is None else [each for each in decoder.modules() if isinstance(each, nn.ModuleList)]
    return next((list(each) for each in lists if len(each) == count), [])


def _last_layers(model: PreTrainedModel) -> dict[int, tuple[int, int]]:
    """Turns of the parameters of the last fifth of the layers and of the fifth below it, of one layer at least each."""
    layers = decoder_layers(model)[::-1]
    fifth = max(1, len(layers) // 5)
    parts = [part for part in (layers[:fifth], layers[fifth : 2 * fifth]) if part]
    return {
        id(parameter): (k, len(parts))
        for k, part in enumerate(parts)
        for layer in part
        for parameter in layer.parameters()
    }


def left_out(model: PreTrainedModel, layout: Layout) -> list[str]:
    """Notices of what a user may take to be tuned and is not: experts with their routers, and other towers.

    Args:
        model: Whose sites were found.
        layout: Those sites.
    """
    sites, owners = {site.name for site in layout.sites}, _owners(model)
    text, total = _text_parameters(model), sum(parameter.numel() for parameter in model.parameters())
    experts: dict[str, int] = {}
    towers: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in text:
            towers[name] = parameter.numel()
        elif name not in sites and parameter.dim() > 1 and (is_routed(name) or not _is_plain(owners[id(parameter)])):
            experts[name] = parameter.numel()
    told = (
        (experts, "are matrices but no linear layers that see every token (experts, routers) and stay as they are"),
        (towers, "do not belong to the text model and stay as they are"),
    )
    return [
        f"{len(names)} parameters, {100 * sum(names.values()) / total:.1f} % of the model, {what}; "
        f"among them {next(iter(names))}"
        for names, what in told
        if names
    ]


def _owners(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The module that holds each parameter, by the parameter's id."""
    return {id(parameter): module for module in model.modules() for parameter in module.parameters(recurse=False)}


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D | nn.Embedding)


def _text_parameters(model: PreTrainedModel) -> set[int]:
    """Ids of the parameters that text alone passes through: not those of a vision tower, for example."""
    if model.config.get_text_config() is model.config:
        return {id(parameter) for parameter in model.parameters()}
    decoder = model.get_decoder()
    if decoder in (None, model, model.base_model):
        raise ModelError(
            f"cannot tell the text model of {type(model).__name__} from its other parts: its configuration has one, "
            "but get_decoder() does not give it. Use a text-only checkpoint."
        )
    parts = (decoder, model.get_output_embeddings())
    return {id(parameter) for part in parts if part is not None for parameter in part.parameters()}


def is_routed(name: str) -> bool:
    """Whether a module or parameter belongs to one expert of several, which sees the tokens routed to it only."""
    return "experts" in name.split(".")


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with an elementwise gain, by trying it.

    That is: one gain, perhaps a bias, no other parameter, and the output is ``normed(x) * (gain + offset) + bias``.
    """
    own = dict(module.named_parameters(recurse=False))
    gain = own.get("weight")
    if gain is None or gain.dim() != 1 or not set(own) <= {"weight", "bias"} or any(True for _ in module.children()):
        return False
    x = torch.linspace(-1, 2, 3 * len(gain), device=gain.device).view(1, 3, -1)
    # Another gain and bias for every feature, so that a module that mixes features is found out.
    tilt = torch.linspace(-1.3, 2.1, len(gain), device=gain.device)
    bias = tilt.flip(0) if "bias" in own else None
    try:
        with torch.no_grad():
            zero, one = (_bare(module, torch.full_like(tilt, value))(x) for value in (0.0, 1.0))
            normed, offset = one - zero, float(zero.abs().max() > 1e-3)
            expected = normed * (tilt + offset) + (0.0 if bias is None else bias)
            close = torch.allclose(zero, offset * normed, atol=1e-5)
            return close and torch.allclose(_bare(module, tilt, bias)(x), expected, atol=1e-5) and bool(normed.any())
    except Exception:  # Whatever a foreign module raises when it is tried: it is not known to be a norm.
        return False


def _bare(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> Callable[..., Tensor]:
    """The module's own forward with another weight and bias."""
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)
    # Plain attributes, because the parameter table only takes parameters.
    twin._parameters = {}
    twin.__dict__.update(weight=weight, bias=bias)
    return lambda *args, **kwargs: type(module).forward(twin, *args, **kwargs)


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
        y = self.matrix.embed(lambda table: _bare(self.module, table)(*args, **kwargs), self.module.weight.data)
        return y.flatten(0, 1).unsqueeze(0)


class TunedNorm:
    """Forward of a normalisation: ``normed(x) * gain_k + bias_k``, with gain and bias in float32."""

    def __init__(self, module: Any, gain: Vector, bias: Vector | None, shape: Shape) -> None:
        self.weight, self.bias = module.weight.data, None if bias is None else module.bias.data
        self.gain, self.shift, self.shape = gain, bias, shape
        self.formula = norms.formula(module, partial(_bare, module))
        self.shown = norms.kernel() if self.weight.is_cuda and self.weight.dtype != torch.float32 else norms.shown
        # Gemma stores the gain less one: the module adds it back.
        self.offset = 1.0 if _adds_one(module) else 0.0
        self.normed = _bare(module, torch.full_like(self.weight, 1.0 - self.offset, dtype=torch.float32))

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


def _adds_one(module: Any) -> bool:
    x = torch.linspace(-1, 2, 3 * len(module.weight), device=module.weight.device).view(1, 3, -1)
    return bool(_bare(module, torch.zeros_like(module.weight.data, dtype=torch.float32))(x).abs().max() > 1e-3)


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
        elif isinstance(module, nn.Linear | Conv1D):
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
