"""A tiny model as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zotune.config import ModelConfig
from zotune.testing import tiny


def write(model: Any, folder: Path) -> ModelConfig:
    """Save a model, and say how it is loaded."""
    tiny.save(model, folder)
    return ModelConfig(path=str(folder), dtype=str(model.dtype).removeprefix("torch."), device="cpu")
