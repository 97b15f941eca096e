"""zotune: zeroth-order fine-tuning of language models, with forward passes only."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    # A whole run: configure, train, go on, look at it.
    "Config": "config",
    "load_config": "config",
    "parse_config": "config",
    "start": "train",
    "resume": "train",
    "evaluate_run": "train",
    "plot": "plots",
    "Summary": "train",
    "Metrics": "evaluate",
    "Reporter": "progress",
    "SilentReporter": "progress",
    "TerminalReporter": "progress",
    "ZotuneError": "errors",
    # Its parts, for a loop of one's own.
    "PRESETS": "presets",
    "Method": "optimizer",
    "Optimizer": "optimizer",
    "EmbeddedRuntime": "runtimes.embedded",
    "Row": "rows",
    "Candidate": "rows",
    "Example": "rows",
    "CandidateCrossEntropy": "objectives",
    "CompletionNLL": "objectives",
    "BatchOrder": "data",
    "load_data": "data",
    "load_model": "models",
}
"""Public names and the modules they come from; loaded on first use, because torch takes seconds."""

_RENAMED = {"load_config": "load", "parse_config": "parse", "load_data": "load", "load_model": "load"}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'zotune' has no attribute {name!r}")
    return getattr(import_module(f"zotune.{_PUBLIC[name]}"), _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
