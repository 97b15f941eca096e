"""The output head of an engine's model, which zotune reads by itself: float32, and only where it is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zotune.runtimes.engine.layers import Table


class Head:
    """An output head.

    Args:
        module: Holds the weight, perhaps a shard of the vocabulary, and perhaps a bias.
        owned: Token ids whose rows are here.
        scale: Factor of the logits.
        soft_cap: Bound of the logits before scaling, or None.
    """

    def __init__(self, module: Any, owned: slice, scale: float, soft_cap: float | None) -> None:
        self.module, self.owned, self.scale, self.soft_cap = module, owned, scale, soft_cap

    def logits(self, hidden: Tensor, mix: Tensor, table: Table | None, vocabulary: Tensor | None) -> Tensor:
        """Float32 logits ``(n, columns)`` of the rows that are here.

        Args:
            hidden: float32 ``(n, width)``.
            mix: The mixture of each, float32 ``(n, columns)``.
            table: What the head is tuned by; None where it is not.
            vocabulary: Which of the rows that are here to score; None for all.
        """
        count = self.owned.stop - self.owned.start
        weight = (self.module.weight[:count] if vocabulary is None else self.module.weight[vocabulary]).float()
        y = hidden @ weight.T if table is None else table.logits(hidden, mix, weight, vocabulary)
        if (bias := getattr(self.module, "bias", None)) is not None:
            y += (bias[:count] if vocabulary is None else bias[vocabulary]).float()
        if self.soft_cap is not None:
            y = torch.tanh(y / self.soft_cap) * self.soft_cap
        return y * self.scale
