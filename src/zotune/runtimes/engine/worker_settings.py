"""What a worker must know when it starts, as plain values that pass through vLLM's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from zotune.config import RuntimeConfig
from zotune.layout import Layout, Site
from zotune.optimizer import Method


def pack(method: Method, layout: Layout, seed: int, options: RuntimeConfig) -> dict[str, Any]:
    """The settings of a run's workers."""
    sites = [[site.name, list(site.shape), site.decays, list(site.turn)] for site in layout.sites]
    return {
        "method": asdict(method),
        "sites": sites,
        "seed": seed,
        "fold": options.fold,
        "bank_rank": options.vllm.bank_rank,
        "adapters": options.vllm.adapters,
    }


def site(plain: Sequence[Any]) -> Site:
    """A site of `pack`."""
    name, shape, decays, (first, every) = plain
    return Site(name, tuple(shape), decays, (first, every))
