"""Peak memory of zotune's steps, of the bare model's inference and of backpropagation, each in its own process."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from zotune.errors import ZotuneError

Side = Literal["zotune", "inference", "adamw", "adamw-lora"]


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
    lora = _child("adamw-lora", settings) if find_spec("peft") else None
    return MemoryReport(_child("zotune", settings), _child("inference", settings), _child("adamw", settings), lora)


def _child(side: Side, settings: Mapping[str, Any]) -> int:
    command = [sys.executable, "-m", "zotune.bench.memory_probe", side, json.dumps(settings, default=str)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ZotuneError(f"measuring the memory of {side} failed: {last[0]}")
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"])


def forget_peak(device: torch.device) -> None:
    """Start a new measurement; where the system cannot, the peak stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak since `forget_peak`, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(fields["VmHWM"].split()[0]) * 1024
    # Kilobytes everywhere but on macOS, where it is bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
