"""Wrapping an engine's layers: each calls what was there and adds its tokens' perturbation.

Matrices and tables are tuned behind custom operators, opaque to a compiler, because what they call may be a packed,
quantised or replaced weight. Normalisations are plain tensor code, which a compiler fuses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from zotune.errors import ModelError
from zotune.runtimes.engine.densewise import DrawnMatrix, DrawnPair, DrawnSpace, DrawnTable
from zotune.runtimes.engine.tokens import Part, TunedVector
from zotune.runtimes.engine.tokenwise import TokenSpace, TunedMatrix, TunedTable
from zotune.runtimes.norms import Formula, normalised_, shown
from zotune.runtimes.own_forward import own_forward

Space = TokenSpace | DrawnSpace
"""What moves the sites of an engine's modules."""

Table = TunedTable | DrawnTable
"""What tunes an embedding."""


@dataclass(frozen=True)
class Place:
    """Where a site is.

    Attributes:
        path: The module's name in the engine.
        module: The module.
        parameter: The parameter's name in it, ``weight`` or ``bias``; of a LoRA matrix that of its site.
        kind: ``linear``, ``table`` (an embedding), ``norm`` or ``lora``.
        part: Where in the parameter.
        base: Of a LoRA matrix, the place of the weight that it stands beside.
    """

    path: str
    module: Any
    parameter: str
    kind: str
    part: Part
    base: Place | None = None


def _parts(places: Sequence[Place]) -> tuple[list[Part], list[Part]]:
    """The parts of a module's weight, and of its bias."""
    weights, biases = ([p.part for p in places if p.parameter == name] for name in ("weight", "bias"))
    return weights, biases


class Layer(ABC):
    """A wrapped module: what was there, and what it is tuned by.

    Attributes:
        tuned: What of the module is, as its `Space` has it.
        plain: Whether to do only what was there.
        calls: So far.
    """

    def __init__(self, path: str, module: Any) -> None:
        self.path, self.module = path, module
        self.tuned: list[Any] = []
        self.plain = False
        self.calls = 0

    @abstractmethod
    def tune(self, places: Sequence[Place], space: Space) -> None:
        """Add what tunes the sites at these places of the module, which is the space's.

        Raises:
            ModelError: The engine does not let a token have a bias of its own there.
        """

    @abstractmethod
    def wrap(self) -> None:
        """Take the module's place."""

    def _refuse(self, biases: Sequence[Part]) -> None:
        for part in biases:
            raise ModelError(
                f"vLLM adds {part.site.name} where zotune cannot tune it. Set method.scope = 'linear', or "
                "runtime.type = 'torch'."
            )


class LinearLayer(Layer):
    """A linear layer, wrapped at its ``quant_method``: stands for it, and passes on all but ``apply``.

    Attributes:
        shape: ``(out, in)`` of the weight that is here; a layer without shards has all of it.
        weight: What it is tuned by.
    """

    weight: TunedMatrix | DrawnMatrix

    def __init__(self, path: str, module: Any) -> None:
        super().__init__(path, module)
        self.base = module.quant_method
        out, width = (
            getattr(module, f"{name}_per_partition", None) or getattr(module, name)
            for name in ("output_size", "input_size")
        )
        self.shape = int(out), int(width)
        self.key = _LAYERS.add(self)

    def tune(self, places: Sequence[Place], space: Space) -> None:
        """See `Layer.tune`."""
        weights, biases = _parts(places)
        if not weights or getattr(self.module, "skip_bias_add", False):
            self._refuse(biases)
        self.weight = space.matrix(weights, self.shape, biases)
        self.tuned = [self.weight]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["base"], name)

    def wrap(self) -> None:
        """Take the place of the module's ``quant_method``."""
        self.module.quant_method = self

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W_n^T + bias`` of every token n; ``x`` is ``(tokens, in)``."""
        if torch.compiler.is_compiling():
            return torch.ops.zotune.linear(x, bias, self.key, self.shape[0])
        return self.run(x, bias)

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What `apply` does, whatever the compiler sees."""
        self.calls += 1
        if self.plain:
            return self.base.apply(self.module, x, bias)
        y = self.base.apply(self.module, x, None if self.weight.decays else bias)
        if self.weight.decays:
            y = y.mul_(self.weight.keep)
            y = y if bias is None else y.add_(bias)
        return self.weight.add_to(y, x, bias is not None)


class TableLayer(Layer):
    """An embedding, perhaps also the output head.

    Attributes:
        weight: What it is tuned by.
    """

    weight: Table

    def __init__(self, path: str, module: Any) -> None:
        super().__init__(path, module)
        self.base = getattr(module, "quant_method", None)
        self.key = _LAYERS.add(self)
        self._forward = module.forward

    def tune(self, places: Sequence[Place], space: Space) -> None:
        """See `Layer.tune`; the bias of a head is added to logits."""
        weights, biases = _parts(places)
        self._refuse(biases)
        self.weight = space.table(weights[0], len(self.module.weight))
        self.tuned = [self.weight]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["base"], name)

    def wrap(self) -> None:
        """Take the place of the module's ``quant_method``, or of its forward where it has none."""
        if self.base is not None:
            self.module.quant_method = self
        else:
            self.module.forward = lambda ids: self.embedding(self.module, ids)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """``W_n[id_n]`` of every token n."""
        if torch.compiler.is_compiling():
            return torch.ops.zotune.embedding(ids, self.key, self.module.weight.shape[1], self.module.weight)
        return self.run(ids)

    def run(self, ids: Tensor) -> Tensor:
        """What `embedding` does, whatever the compiler sees."""
        self.calls += 1
        found = self._lookup(self.module.weight, ids)
        if self.plain:
            return found
        return self.weight.embed(lambda table: self._lookup(table, ids), found)

    def _lookup(self, table: Tensor, ids: Tensor) -> Tensor:
        if self.base is not None:
            return F.embedding(ids, table)
        found: Tensor = own_forward(self.module, table)(ids)
        return found

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits for the engine's own requests, which see the model without directions."""
        assert self.base is not None
        y: Tensor = self.base.apply(layer, x, bias)
        if self.plain:
            return y
        if self.weight.decays:
            y = y.mul_(self.weight.keep)
        return y.add_(self.weight.learnt(x.float()))


class NormLayer(Layer):
    """A normalisation with a gain and perhaps a bias: ``normed(x) * (gain + offset) + bias``.

    Which kind it is, is found out by trying.

    Raises:
        ModelError: It is of no kind that is known.
    """

    def __init__(self, path: str, module: Any) -> None:
        super().__init__(path, module)
        self._stored = module.weight.data
        self._stored_bias = getattr(module, "bias", None)
        self._dtype = module.weight.dtype
        self._formula = self._tried(module.forward)
        self.weight: TunedVector | None = None
        self.bias: TunedVector | None = None

    def tune(self, places: Sequence[Place], space: Space) -> None:
        """See `Layer.tune`."""
        self.weight, self.bias = (
            TunedVector(parts, max(part.local.stop for part in parts), space.mix) if parts else None
            for parts in _parts(places)
        )
        self.tuned = [each for each in (self.weight, self.bias) if each is not None]

    def wrap(self) -> None:
        """Take the place of the module's forward."""
        self.module.forward = self.run

    def run(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise ``(tokens, ..., n)``, after adding the residual if there is one; with it the sum is given too."""
        if residual is not None:
            residual = x = x + residual
        gain, bias = self._gain(len(x)), self._bias(len(x))
        spread = (len(x),) + (1,) * (x.dim() - 2) + (-1,)
        y = normalised_(x.to(torch.float32, copy=True), self._formula.centred, self._formula.eps)
        y.mul_(gain.view(spread))
        if bias is not None:
            y.add_(bias.view(spread))
        return y.to(x.dtype) if residual is None else (y.to(x.dtype), residual)

    def _gain(self, tokens: int) -> Tensor:
        stored = self._stored.float()
        if self.weight is None:
            return (stored + self._formula.offset).expand(tokens, -1)
        kept = stored * self.weight.keep if self.weight.decays else stored
        return self.weight.seen(kept + self._formula.offset, tokens)

    def _bias(self, tokens: int) -> Tensor | None:
        if self._stored_bias is None:
            return None
        stored = self._stored_bias.float()
        return stored.expand(tokens, -1) if self.bias is None else self.bias.seen(stored, tokens)

    def _tried(self, forward: Callable[[Tensor], Tensor]) -> Formula:
        eps = float(getattr(self.module, "variance_epsilon", getattr(self.module, "eps", 0.0)))
        n, device = len(self._stored), self._stored.device
        x = torch.linspace(-1, 2, 3 * n, device=device).view(3, n).sin().to(self._dtype)
        with torch.no_grad():
            expected = forward(x.clone()).float()
            # Relative to what comes out, or all kinds would be alike where gains are small.
            tolerance = (2e-2 if self._dtype != torch.float32 else 1e-4) * min(1.0, float(expected.abs().max()))

            def fits(tried: Formula) -> bool:
                affine = self._stored, torch.zeros(n, device=device), self._stored_bias, None
                y = shown(x, *affine, tried.centred, eps, tried.offset)
                return torch.allclose(y.float(), expected, atol=tolerance, rtol=2e-2)

            found = Formula.fitting(eps, fits)
        if found is None:
            raise ModelError(
                f"{self.path} ({type(self.module).__name__}) is no normalisation that zotune knows. "
                "Set method.scope = 'linear' to tune the linear layers only."
            )
        return found


class LoraLayer(LinearLayer):
    """A linear layer with LoRA matrices beside it, which are tuned in its place; see `zotune.runtimes.engine.lora`."""

    def tune(self, places: Sequence[Place], space: Space) -> None:
        """See `Layer.tune`."""
        assert space.method.lora_rank is not None
        scale, self.pairs = space.method.lora_alpha / space.method.lora_rank, []
        # Of one layer after the other A, then B, as PEFT has them.
        for down, up in zip(places[::2], places[1::2], strict=True):
            assert down.base is not None
            stored = [getattr(self.module, each.parameter) for each in (down, up)]
            self.pairs.append(DrawnPair(down.base.part.local, scale, stored, (down.part, up.part), space.mix))
        self.tuned = [each for pair in self.pairs for each in pair.tuned]

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `LinearLayer.run`."""
        self.calls += 1
        y: Tensor = self.base.apply(self.module, x, bias)
        for pair in () if self.plain else self.pairs:
            pair.add_to(y, x)
        return y


_KINDS: dict[str, type[LinearLayer] | type[TableLayer] | type[NormLayer]] = {
    "linear": LinearLayer,
    "lora": LoraLayer,
    "table": TableLayer,
    "norm": NormLayer,
}


def wrap(places: Sequence[Place], space: Space) -> list[Layer]:
    """Wrap the modules of these places; what was wrapped, in order.

    Args:
        places: One per site.
        space: What moves the sites; it is yet to be attached to what the layers are tuned by.
    """
    by_module: dict[str, list[Place]] = {}
    for place in places:
        by_module.setdefault(place.path, []).append(place)
    layers = []
    for path, members in by_module.items():
        layer: Any = _KINDS[members[0].kind](path, members[0].module)
        layer.tune(members, space)
        layer.wrap()
        layers.append(layer)
    return layers


class _Registry:
    """Layers by number, for as long as their model lives; a number is given once."""

    def __init__(self) -> None:
        self.given = 0
        self._layers: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def add(self, layer: Any) -> int:
        self._layers[self.given] = layer
        self.given += 1
        return self.given - 1

    def __getitem__(self, number: int) -> Any:
        return self._layers[number]


_LAYERS = _Registry()


def registered() -> int:
    """How many layers that compiled code may call this process has had so far."""
    return _LAYERS.given


def number_from(first: int) -> None:
    """Give the next layers this number and those after it, or higher ones where it is taken.

    Compiled code that another process has kept calls layers by the numbers that they had there.
    """
    _LAYERS.given = max(_LAYERS.given, first)


@torch.library.custom_op("zotune::linear", mutates_args=())
def _linear(x: Tensor, bias: Tensor | None, key: int, width: int) -> Tensor:
    return _LAYERS[key].run(x, bias)


@_linear.register_fake
def _(x: Tensor, bias: Tensor | None, key: int, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


@torch.library.custom_op("zotune::embedding", mutates_args=())
def _embedding(ids: Tensor, key: int, width: int, like: Tensor) -> Tensor:
    return _LAYERS[key].run(ids)


@_embedding.register_fake
def _(ids: Tensor, key: int, width: int, like: Tensor) -> Tensor:
    return like.new_empty(*ids.shape, width)
