"""zotune: zeroth-order fine-tuning of language models, with forward passes only."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Config": "config",
    "load_config": "config",
    "parse_config": "config",
    "Method": "optimizer",
    "Optimizer": "optimizer",
    "PRESETS": "presets",
    "BatchOrder": "data",
    "load_data": "data",
    "load_model": "models",
    "EmbeddedRuntime": "runtimes.embedded",
    "Summary": "train",
    "Metrics": "evaluate",
    "start": "train",
    "resume": "train",
    "evaluate_run": "train",
    "plot": "plots",
    "ZotuneError": "errors",
}
"""Public names and the modules they come from; loaded on first use, because torch takes seconds."""

_RENAMED = {"load_config": "load", "parse_config": "parse", "load_data": "load", "load_model": "load"}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'zotune' has no attribute {name!r}")
    return getattr(import_module(f"zotune.{_PUBLIC[name]}"), _RENAMED.get(name, name))
