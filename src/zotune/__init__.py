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
    "dry_run": "dryrun",
    "replay": "journal.replay",
    "rollback": "journal.branches",
    "plot": "watching.plots",
    "export_run": "export",
    "apply_journal": "export",
    "overlay": "watching.overlays",
    "write_report": "watching.report",
    "read_sweep": "watching.sweep",
    "run_sweep": "watching.sweep",
    "summarise_sweep": "watching.sweep",
    "Summary": "train",
    "DryRun": "dryrun",
    "Metrics": "evaluate",
    "Evaluation": "evaluate",
    "Reporter": "reporters",
    "SilentReporter": "reporters",
    "TerminalReporter": "progress",
    "ZotuneError": "errors",
    "StopRun": "errors",
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

_RENAMED = {
    "load_config": "load",
    "parse_config": "parse",
    "load_data": "load",
    "load_model": "load",
    "write_report": "write",
    "read_sweep": "read",
    "run_sweep": "run",
    "summarise_sweep": "summarise",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'zotune' has no attribute {name!r}")
    return getattr(import_module(f"zotune.{_PUBLIC[name]}"), _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
