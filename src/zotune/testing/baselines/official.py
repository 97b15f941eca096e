"""MeZO's and LOZO's published step procedures, in the model's own dtype: the baseline of benchmarks and parity tests.

Sources: Malladi et al. 2023 (MeZO) and Chen et al. 2025 (LOZO), as their released code carries a step out: one reseeded
random stream, three in-place passes over all parameters to perturb and restore, one more to update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from zotune.errors import DataError
from zotune.rows import Example

UNDECAYED = ("bias", "layer_norm", "layernorm")
"""Parts of parameter names that the official code does not decay."""


@dataclass(frozen=True)
class PaddedBatch:
    """A batch as a padding collator makes it: one sequence per candidate, all of several or all of one.

    Attributes:
        input_ids: int64 ``(sequences, length)``, padded on the left to a multiple of 8.
        attention_mask: int64, same shape, 0 on padding.
        scored: For each sequence the indices of its scored tokens.
        sizes: Candidates per example, in order.
        gold: Index of the right candidate, per example.
    """

    input_ids: Tensor
    attention_mask: Tensor
    scored: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    gold: tuple[int, ...]


def collate(examples: Sequence[Example], pad: int = 0) -> PaddedBatch:
    """Pad a batch the way the official code's collator does.

    Args:
        examples: Each with two candidates or more, to choose from, or each with one, to be made likely.
        pad: Token id of padding.

    Raises:
        DataError: There are no examples, or some have a single candidate and some have more.
    """
    sizes = tuple(len(example.row.candidates) for example in examples)
    if not sizes or (min(sizes) == 1 and max(sizes) > 1):
        raise DataError(
            f"the official losses are of examples with two candidates or more, or with one each, got {sizes}: give "
            "examples of one kind"
        )
    pairs = [(example.row.prompt, candidate) for example in examples for candidate in example.row.candidates]
    longest = max(len(prompt) + len(candidate.tokens) for prompt, candidate in pairs)
    length = -(-longest // 8) * 8
    input_ids = torch.full((len(pairs), length), pad)
    attention_mask = torch.zeros_like(input_ids)
    scored = []
    for sequence, (prompt, candidate) in enumerate(pairs):
        tokens = (*prompt, *candidate.tokens)
        input_ids[sequence, length - len(tokens) :] = torch.tensor(tokens)
        attention_mask[sequence, length - len(tokens) :] = 1
        scored.append(tuple(length - len(candidate.tokens) + index for index in candidate.scored))
    gold = tuple(example.gold for example in examples)
    return PaddedBatch(input_ids, attention_mask, tuple(scored), sizes, gold)


def padded_loss(model: nn.Module, batch: PaddedBatch) -> float:
    """Cross-entropy over each example's candidates of their mean log-probability, mean over examples.

    Where each example has one candidate, it is the negative of its mean log-probability, mean over examples: the loss
    of MeZO's tasks of generation, COPA among them. Everything is in the model's dtype. The softmax is taken at the
    scored positions only: the official code takes it everywhere and then drops the rest, which costs more and changes
    nothing.
    """
    device = next(model.parameters()).device
    ids = batch.input_ids.to(device)
    logits = model(input_ids=ids, attention_mask=batch.attention_mask.to(device), use_cache=False).logits
    counts = [len(positions) for positions in batch.scored]
    # All places in one copy: on a GPU each would wait for the forward.
    places = torch.tensor([position for positions in batch.scored for position in positions]).to(device).split(counts)
    means = []
    for sequence, where in enumerate(places):
        log_probabilities = torch.log_softmax(logits[sequence, where - 1], dim=-1)
        means.append(log_probabilities.gather(1, ids[sequence, where, None]).mean())
    if max(batch.sizes) == 1:
        return -float(torch.stack(means).mean())
    examples = torch.stack(means).split(list(batch.sizes))
    losses = [-torch.log_softmax(group, dim=0)[gold] for group, gold in zip(examples, batch.gold, strict=True)]
    return float(torch.stack(losses).mean())


class OfficialMezo:
    """MeZO's step: a dense normal direction redrawn from one seed four times.

    Args:
        model: Changed in place; keeps its dtype. Every parameter that requires gradients is tuned.
        lr: Learning rate.
        eps: Distance of a probe.
        weight_decay: Not applied to names that hold ``bias``, ``layer_norm`` or ``layernorm``.
        seed: Of the sequence of step seeds.

    Attributes:
        steps: Steps done.
        projected_gradient: Of the last step, ``(L(+) - L(-)) / (2 eps)``.
    """

    def __init__(
        self, model: nn.Module, *, lr: float, eps: float = 1e-3, weight_decay: float = 0.0, seed: int = 0
    ) -> None:
        self.model = model.eval()
        self.lr, self.eps, self.weight_decay = lr, eps, weight_decay
        self.steps = 0
        self.projected_gradient = 0.0
        self._seeds = np.random.default_rng(seed)
        self._parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def step(self, examples: Sequence[Example]) -> float:
        """One step on a batch.

        Returns:
            ``L(+)``, the loss that the official code logs.

        Raises:
            DataError: See `collate`.
        """
        batch = collate(examples)
        seed = int(self._seeds.integers(1_000_000_000))
        self._perturb(seed, 1)
        plus = padded_loss(self.model, batch)
        self._perturb(seed, -2)
        minus = padded_loss(self.model, batch)
        self._perturb(seed, 1)
        self.projected_gradient = (plus - minus) / (2 * self.eps)
        self._update(seed)
        self.steps += 1
        return plus

    def _perturb(self, seed: int, scale: int) -> None:
        for _, parameter, direction in self._directions(seed, updating=False):
            parameter.add_(direction, alpha=scale * self.eps)

    def _update(self, seed: int) -> None:
        for name, parameter, direction in self._directions(seed, updating=True):
            change = self.projected_gradient * direction
            if self.weight_decay and not any(part in name for part in UNDECAYED):
                change += self.weight_decay * parameter
            parameter.sub_(change, alpha=self.lr)

    def _directions(self, seed: int, updating: bool) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Each parameter with its direction, drawn in the parameters' order from a freshly seeded stream."""
        generators: dict[torch.device, torch.Generator] = {}
        for name, parameter in self._parameters:
            if parameter.device not in generators:
                # The stream of torch.manual_seed, without disturbing the caller's global one.
                generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
            yield name, parameter, self._direction(name, parameter, generators[parameter.device], updating)

    def _direction(self, name: str, parameter: nn.Parameter, stream: torch.Generator, updating: bool) -> Tensor:
        return _normal(tuple(parameter.shape), parameter, stream)


class OfficialLozo(OfficialMezo):
    """LOZO's step: ``U V^T`` for matrices with V kept for ``interval`` steps, dense normal for vectors.

    On the first step of each interval V is drawn before U while probing. The released code draws U alone while
    updating, on that step too, and so applies another U than it probed.

    Args:
        model: As for `OfficialMezo`.
        lr: Learning rate.
        eps: Distance of a probe.
        rank: Columns of U and V.
        interval: Steps that share V.
        weight_decay: As for `OfficialMezo`.
        seed: As for `OfficialMezo`.
        applies_probed: Draw V before U while updating too, so that the probed direction is the applied one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        eps: float = 1e-3,
        rank: int = 2,
        interval: int = 50,
        weight_decay: float = 0.0,
        seed: int = 0,
        applies_probed: bool = False,
    ) -> None:
        super().__init__(model, lr=lr, eps=eps, weight_decay=weight_decay, seed=seed)
        self.rank, self.interval, self.applies_probed = rank, interval, applies_probed
        self._v: dict[str, Tensor] = {}

    def _direction(self, name: str, parameter: nn.Parameter, stream: torch.Generator, updating: bool) -> Tensor:
        if parameter.dim() < 2:
            return _normal(tuple(parameter.shape), parameter, stream)
        rows, columns = parameter.shape
        if self.steps % self.interval == 0 and (self.applies_probed or not updating):
            self._v[name] = _normal((columns, self.rank), parameter, stream)
        return _normal((rows, self.rank), parameter, stream) @ self._v[name].T


def _normal(shape: tuple[int, ...], like: Tensor, stream: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=stream, dtype=like.dtype, device=like.device)
