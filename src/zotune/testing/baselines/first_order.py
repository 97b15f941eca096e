"""First-order fine-tuning: AdamW by backpropagation, of every parameter or of LoRA matrices.

Sources: Loshchilov and Hutter 2019 (AdamW), Hu et al. 2022 (LoRA, added by PEFT). What they are compared with gives the
examples, the objective and the order of the batches (`zotune.data`).

A step costs one forward and one backward over a sequence per candidate, padded to the longest of the batch, about three
forwards, with the whole vocabulary's logits at every position. It keeps activations, a gradient and two moments.

Deviations from how such baselines are usually run: no dropout, no clipping, and everything in the model's own dtype, so
give a float32 model: in 16 bits, steps of a usual size are lost in rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR

from zotune.objectives import CandidateCrossEntropy, Objective
from zotune.rows import Example, Row
from zotune.runtimes.embedded import lora
from zotune.schedules import factor


def mean_loss(model: Any, objective: Objective, examples: Sequence[Example]) -> Tensor:
    """The objective's mean over a batch, float32 and differentiable, equal to that of its ``losses``.

    Args:
        model: A Hugging Face causal language model.
        objective: One of `zotune.objectives`.
        examples: At least one.
    """
    means = _mean_log_probabilities(model, [example.row for example in examples])
    groups = means.split([len(example.row.candidates) for example in examples])
    chosen = torch.stack([group[example.gold] for group, example in zip(groups, examples, strict=True)])
    if isinstance(objective, CandidateCrossEntropy):
        chosen = chosen - torch.stack([group.logsumexp(0) for group in groups])
    return -chosen.mean()


def _mean_log_probabilities(model: Any, rows: Sequence[Row]) -> Tensor:
    """Mean log-probability of every candidate's scored tokens, float32 ``(candidates,)``."""
    pairs = [(row.prompt, candidate) for row in rows for candidate in row.candidates]
    sequences = [torch.tensor([*prompt, *candidate.tokens]) for prompt, candidate in pairs]
    # Padding at the right needs no mask: causal attention never looks there.
    ids = pad_sequence(sequences, batch_first=True).to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    means = []
    for sequence, (prompt, candidate) in enumerate(pairs):
        at = torch.tensor([len(prompt) + index for index in candidate.scored], device=ids.device)
        log_probabilities = logits[sequence, at - 1].float().log_softmax(-1)
        means.append(log_probabilities.gather(1, ids[sequence, at, None]).mean())
    return torch.stack(means)


class FirstOrder:
    """AdamW on a model, which it changes.

    Args:
        model: A Hugging Face causal language model.
        objective: What the batches are judged by.
        lr: Learning rate of the first step; it falls to 0 in a line.
        steps: Length of the run.
        weight_decay: Decoupled, on every tuned parameter.
        lora_rank: Tune freshly added LoRA matrices of this rank on the query and value projections; None: every
            parameter of the model.
        lora_alpha: LoRA's alpha.
        seed: Of the LoRA matrices.

    Raises:
        ModelError: LoRA cannot be added: PEFT is not installed, or the model's projections are not known.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        *,
        lr: float,
        steps: int,
        weight_decay: float = 0.0,
        lora_rank: int | None = None,
        lora_alpha: int = 16,
        seed: int = 0,
    ) -> None:
        self.model, self.objective = model.eval(), objective
        if lora_rank is not None:
            # PEFT freezes what it does not add.
            lora.add(model, lora_rank, lora_alpha, seed)
        tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(tuned, lr=lr, weight_decay=weight_decay)
        self._schedule = LambdaLR(self._optimizer, lambda step: factor("linear", step, steps, 0))

    def step(self, examples: Sequence[Example]) -> float:
        """One step on a batch; gives the loss before it."""
        loss = mean_loss(self.model, self.objective, examples)
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return float(loss.detach())
