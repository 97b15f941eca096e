"""The dense oracle: zeroth-order steps by the book on an unmodified model, slow and plain.

It shares with the runtimes only the messages and the drawn directions. Every candidate is its own unpadded sequence,
every perturbation is added to the float32 weights, nothing is packed, folded or cached.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zotune.directions import DenseDirections, Directions, LowRankDirections
from zotune.errors import ModelError
from zotune.layout import Scope, Site
from zotune.optimizer import Method
from zotune.rows import Candidate, Row
from zotune.testing.baselines.official import UNDECAYED


def sites(model: nn.Module, scope: Scope) -> tuple[Site, ...]:
    """The sites of an unmodified model, found in the plainest way, in ``named_parameters`` order.

    Args:
        model: A Hugging Face causal language model. Tied parameters are one site, under their first name.
        scope: See `zotune.layout.Scope`.
    """
    transposed = _transposed(model)
    turns = {"linear": _linear_weights, "last-layers": _last_layers, "all": _all}[scope](model)
    found = []
    for name, parameter in model.named_parameters():
        if name in turns:
            shape = tuple(parameter.shape[::-1] if name in transposed else parameter.shape)
            decays = not any(part in name for part in UNDECAYED)
            found.append(Site(name, shape, decays, turns[name]))
    return tuple(found)


def _transposed(model: nn.Module) -> set[str]:
    """Names of weights that are stored as ``(in, out)``."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


_Turns = dict[str, tuple[int, int]]


def _all(model: nn.Module) -> _Turns:
    return {name: (0, 1) for name, _ in model.named_parameters()}


def _last_layers(model: nn.Module) -> _Turns:
    """The last fifth of the layers and the one before, by the number in the parameters' names."""
    config: Any = model.config
    count = config.num_hidden_layers
    fifth = max(1, count // 5)
    places = {name: re.search(r"\.(?:layers|h)\.(\d+)\.", name) for name, _ in model.named_parameters()}
    before = {name: (count - 1 - int(place[1])) // fifth for name, place in places.items() if place}
    return {name: (k, min(2, count)) for name, k in before.items() if k < 2}


def _linear_weights(model: nn.Module) -> _Turns:
    head = model.get_output_embeddings()  # type: ignore[operator]
    layers = [item for item in model.named_modules() if isinstance(item[1], nn.Linear | Conv1D)]
    return {f"{name}.weight": (0, 1) for name, module in layers if module is not head}


def directions(sites: Sequence[Site], method: Method, seed: int = 0) -> Directions:
    """The directions that a runtime must use for these sites, this method and this run seed."""
    if method.family == "dense":
        return DenseDirections(sites, seed=seed, distribution=method.distribution)
    return LowRankDirections(sites, seed=seed, rank=method.rank, scale=method.scale, distribution=method.distribution)


class DenseOracle:
    """A float32 copy of a model that is scored and changed one dense tensor at a time.

    Args:
        model: An unmodified Hugging Face causal language model; it is copied.
        sites: What is perturbed and updated. A perturbation is a list with one float32 tensor of each site's shape.

    Attributes:
        model: The copy.
        sites: As given.
        weights: Each site's tensor as a view of the copy's parameter, in the site's ``(out, in)`` orientation.

    Raises:
        ModelError: A site is not a parameter of the model, has another shape, or is tied to another site.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        copied: Any = copy.deepcopy(model)
        self.model = copied.float().eval()
        # The only attention of transformers that honours every soft cap and sliding window by itself.
        self.model.set_attn_implementation("eager")
        self.sites = tuple(sites)
        transposed = _transposed(self.model)
        self.weights = [self._weight(site, site.name in transposed) for site in self.sites]
        if len({weight.data_ptr() for weight in self.weights}) < len(self.weights):
            raise ModelError("two sites are tied to each other; list a tied parameter once, under its first name")

    def _weight(self, site: Site, transposed: bool) -> Tensor:
        try:
            data = self.model.get_parameter(site.name).data
        except AttributeError as error:
            raise ModelError(f"site {site.name!r} is not a parameter of {type(self.model).__name__}") from error
        weight = data.T if transposed else data
        if tuple(weight.shape) != site.shape:
            raise ModelError(f"site {site.name!r} has shape {site.shape}, the model's parameter {tuple(weight.shape)}")
        return weight

    def score(
        self, rows: Sequence[Row], perturbation: Sequence[Tensor] | None = None, scale: float = 0.0
    ) -> np.ndarray:
        """Log-likelihoods with the weights at ``W + scale * perturbation``.

        Returns:
            float32 ``(total candidates,)`` in the order of the rows; natural logarithm, summed over scored tokens.
        """
        with torch.no_grad(), self._moved(perturbation, scale):
            scores = [self._log_likelihood(row.prompt, candidate) for row in rows for candidate in row.candidates]
        return np.array(scores, dtype=np.float32)

    def _log_likelihood(self, prompt: tuple[int, ...], candidate: Candidate) -> float:
        tokens = torch.tensor([*prompt, *candidate.tokens])
        logits = self.model(input_ids=tokens[None], use_cache=False).logits[0]
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        positions = [len(prompt) + index for index in candidate.scored]
        return float(sum(log_probabilities[position - 1, tokens[position]] for position in positions))

    @contextmanager
    def _moved(self, perturbation: Sequence[Tensor] | None, scale: float) -> Iterator[None]:
        """Weights at ``W + scale * perturbation`` inside, bit for bit at W again afterwards."""
        if perturbation is None:
            yield
            return
        before = [weight.clone() for weight in self.weights]
        self.update(perturbation, -scale)
        try:
            yield
        finally:
            for weight, value in zip(self.weights, before, strict=True):
                weight.copy_(value)

    def update(self, perturbation: Sequence[Tensor], amount: float, decay: float = 0.0) -> None:
        """``W <- W - amount * perturbation - decay * W``: one step of MeZO or LOZO for ``amount = lr * c``.

        Args:
            perturbation: A direction, or a weighted sum of directions.
            amount: Learning rate times projected gradient.
            decay: Learning rate times weight decay; sites that do not decay are spared.
        """
        with torch.no_grad():
            for site, weight, change in zip(self.sites, self.weights, perturbation, strict=True):
                shrink = decay if site.decays else 0.0
                weight.copy_(weight - amount * change - shrink * weight)
