"""Engines around tiny models, and what closes them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from tiny_checkpoint import write

from zotune.config import EngineConfig, RuntimeConfig
from zotune.optimizer import Method
from zotune.runtimes.engine.runtime import EngineRuntime, Work
from zotune.testing import tiny

HEAD_SIZE = 32
"""The smallest that vLLM's attention takes on a CPU."""


@contextmanager
def engines(
    *, fold: Literal["stochastic", "master"] = "stochastic", models: Path | None = None, **options: Any
) -> Iterator[Any]:
    """A factory of runtimes for `zotune.testing.conformance`; closes them all at the end.

    Args:
        fold: Of ``[runtime]``.
        models: Where checkpoints are written; the next factory may write the same ones there.
        options: Keys of the table ``[runtime.vllm]``.
    """
    started: list[EngineRuntime] = []
    with tempfile.TemporaryDirectory() as folder:

        def start(model: Any, method: Method, *, seed: int = 0, max_tokens: int = 2048) -> EngineRuntime:
            config = write(model, (models or Path(folder)) / f"model-{len(started)}")
            chosen = RuntimeConfig(type="vllm", fold=fold, max_tokens=max_tokens, vllm=EngineConfig(**options))
            work = Work(step_tokens=512, longest=tiny.CONTEXT, largest=96)
            runtime = EngineRuntime.start(config, model, method, seed=seed, options=chosen, work=work)
            started.append(runtime)
            return runtime

        try:
            yield start
        finally:
            for runtime in started:
                runtime.close()
