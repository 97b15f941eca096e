"""What an engine will hold in memory, and what there is, before anything is loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zotune.errors import ModelError
from zotune.models import head_width
from zotune.runtimes.engine import slots

_CGROUP = Path("/sys/fs/cgroup")
_CACHED = ("active_file", "inactive_file")


@dataclass(frozen=True)
class Demand:
    """Bytes on one device.

    Attributes:
        weights: The model in the engine's dtype.
        factors: What the directions and updates of all sites take, adapter slots, and copies that folding needs.
        cache: Keys and values.
    """

    weights: int
    factors: int
    cache: int

    def check(self, available: int, where: str) -> None:
        """Refuse what does not fit.

        Raises:
            ModelError: There is less than is needed; both numbers are in the message.
        """
        needed = self.weights + self.factors + self.cache
        if needed > available:
            raise ModelError(
                f"vLLM needs about {needed:,} bytes on {where} (weights {self.weights:,}, factors and copies "
                f"{self.factors:,}, keys and values {self.cache:,}), and {available:,} are available. Use a smaller "
                "model, model.dtype = 'bfloat16', or a lower runtime.max_tokens or method.rank; or free some memory."
            )


def cache_bytes(config: Any, itemsize: int, *, block: int, tokens: int, rows: int, longest: int, shards: int) -> int:
    """Bytes of keys and values on one worker that any forward of so many tokens and rows can do with.

    Args:
        config: Of the text model, from transformers.
        itemsize: Bytes of a key's or value's element.
        block: Tokens of a block.
        tokens: Most tokens of a forward.
        rows: Most sequences of a forward.
        longest: Most tokens of a sequence.
        shards: Workers that share the heads.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = head_width(config)
    page = 2 * block * -(-heads // shards) * width * itemsize
    # A row's last block may be almost empty. One block is vLLM's own; windows that slide hold one that is half out.
    blocks = tokens // block + rows + -(-longest // block) + 2
    return padded_layers(config) * page * blocks


def padded_layers(config: Any) -> int:
    """Layers that blocks are held for: kinds of attention are put into groups of one size, which may not come out even.

    vLLM's rule: the size is the rarest kind's count, or the commonest's where that is less than half as much again.
    """
    kinds = Counter(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    least, most = min(kinds.values()), max(kinds.values())
    size = most if most < 1.5 * least else least
    return sum(-(-count // size) * size for count in kinds.values())


def factor_bytes(settings: Mapping[str, Any], itemsize: int, *, shards: int, host: bool) -> int:
    """Bytes of what one worker keeps for the sites where its model is.

    Args:
        settings: What `zotune.runtimes.engine.worker_settings.pack` wrote.
        itemsize: Bytes of an element of the model's dtype.
        shards: Workers that share every layer.
        host: Whether the model is on the host: float32 copies are there, and weights in plain form beside those that
            the engine has packed for the processor.
    """
    shapes = [shape for _, shape, *_ in settings["sites"]]
    copies = host * (itemsize + 4 * (settings["fold"] == "master"))
    kept = copies * sum(math.prod(shape) for shape in shapes if len(shape) == 2) // shards
    if settings["method"]["family"] == "dense":
        # One site's direction at a time, float32: as drawn, and what it adds to an update or to a product.
        return kept + (8 + itemsize) * max(math.prod(shape) for shape in shapes)
    beside = sum(sum(shape) for shape in shapes if len(shape) == 2)
    # Layers hold the bank's columns in the model's dtype, the host their float32 masters.
    kept += settings["bank_rank"] * (itemsize + 4 * host) * beside
    if settings["adapters"] == "lora":
        kept += (slots.COUNT + 1) * slots.served_rank(settings["method"]["rank"]) * itemsize * beside
    return kept + sum(_low_rank_bytes(shape, settings["method"], itemsize, shards) for shape in shapes)


def _low_rank_bytes(shape: Sequence[int], method: Mapping[str, Any], itemsize: int, shards: int) -> int:
    """Bytes of a site's factors on one worker."""
    rank, columns = method["rank"], 1 + method["directions"]
    out, width = (*shape, 0)[:2]
    vectors = out if len(shape) == 1 else rank * out
    # float32, and whole on every worker: the update, every direction drawn and V. In the model's dtype: what the
    # layers that are here multiply by, with a V for every column.
    total = 4 * (columns + (method["momentum"] > 0)) * vectors + itemsize * columns * vectors // shards
    return total + (4 + itemsize * columns) * rank * width


def available(cuda: bool, fraction: float) -> int:
    """Bytes that may be taken: of a GPU the free part of its share, else of the machine's or the container's memory."""
    if cuda:
        free, total = torch.cuda.mem_get_info()
        return min(free, int(total * fraction))
    import psutil

    return min(int(psutil.virtual_memory().available), *_container())


def _container() -> list[int]:
    """What the control group leaves, if there is a limit: files that it has cached can be given up."""
    found = []
    for limit, usage, statistics in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            most, used = (int((_CGROUP / name).read_text()) for name in (limit, usage))
            lines = (line.split() for line in (_CGROUP / statistics).read_text().splitlines())
            found.append(most - used + sum(int(value) for name, value in lines if name in _CACHED))
        # There is no such file, or the limit is the word "max".
        except (OSError, ValueError):
            continue
    return found or [2**63]
