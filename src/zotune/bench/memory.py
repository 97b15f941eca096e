"""Peak memory of zotune's steps, of the bare model's inference and of backpropagation, each in its own process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from zotune.bench import child

_PROBE = "zotune.bench.memory_probe"


@dataclass(frozen=True)
class MemoryReport:
    """Peak bytes from the moment the model is loaded: of the process, or of the GPU's allocator.

    Attributes:
        zotune: While stepping, a fold included.
        inference: While the bare model runs forward over the padded batch, logits at the last token only.
        adamw: While every parameter is tuned by `zotune.testing.baselines.first_order`.
        adamw_lora: The same of LoRA matrices; None where PEFT is not installed.
    """

    zotune: int
    inference: int
    adamw: int
    adamw_lora: int | None

    @property
    def ratio(self) -> float:
        """zotune's peak over the bare model's."""
        return self.zotune / self.inference


def measure(settings: Mapping[str, Any]) -> MemoryReport:
    """Run all sides.

    Args:
        settings: Arguments of `zotune.bench.steps.prepare`, and ``rank``, ``scope`` and ``directions``.

    Raises:
        ZotuneError: A measuring process failed; the message has what it printed last.
    """

    def peak(side: str) -> int:
        return int(child.figures(_PROBE, side, settings)["peak_bytes"])

    lora = peak("adamw-lora") if find_spec("peft") else None
    return MemoryReport(peak("zotune"), peak("inference"), peak("adamw"), lora)
