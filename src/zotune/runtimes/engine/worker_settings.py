"""What a worker must know when it starts, as plain values that pass through vLLM's configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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


_DRIVERS = ("lr", "eps", "schedule", "warmup_steps", "estimator", "calibrated", "interval")
"""What of a method the driver alone goes by."""


@dataclass(frozen=True)
class Carried:
    """The settings as vLLM's configuration carries them to a worker.

    vLLM keeps what it compiled under a hash of its configuration. A run that differs in its seed or its learning rate
    alone is compiled to the same code, so neither is in the hash.

    Attributes:
        values: What `pack` wrote.
        layers: How many layers the driver's process has wrapped before: compiled code names them by numbers, so it must
            not be found by another engine of the process. In whatever process a worker is, it counts on from there.
    """

    values: Mapping[str, Any]
    layers: int

    def compute_hash(self) -> str:
        """What vLLM asks; hexadecimal."""
        method = {name: value for name, value in self.values["method"].items() if name not in _DRIVERS}
        seen = [method, self.values["sites"], self.values["bank_rank"], self.values["adapters"], self.layers]
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def site(plain: Sequence[Any]) -> Site:
    """A site of `pack`."""
    name, shape, decays, (first, every) = plain
    return Site(name, tuple(shape), decays, (first, every))
