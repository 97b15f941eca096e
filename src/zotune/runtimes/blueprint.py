"""What a runtime is built from: plain values, so that any process on any machine can build it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from zotune import models
from zotune.config import ModelConfig, RuntimeConfig
from zotune.optimizer import Method
from zotune.runtimes.base import Runtime
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.engine import checkpoint_layout
from zotune.runtimes.engine.runtime import EngineRuntime, Work


@dataclass(frozen=True)
class Blueprint:
    """A runtime that is yet to be built.

    Attributes:
        model: The checkpoint.
        method: What to tune, and how directions look.
        seed: The run's seed.
        options: The table ``[runtime]``, whose type is ``torch`` or ``vllm``.
        work: What an engine is to be made ready for; None where there is none.
    """

    model: ModelConfig
    method: Method
    seed: int
    options: RuntimeConfig
    work: Work | None = None

    def load(self) -> tuple[Any, Any]:
        """The model as `build` takes it, and its tokenizer; errors as for `zotune.models.load`."""
        return (models.load if self.options.type == "torch" else checkpoint_layout.load)(self.model)

    def build(self, model: Any) -> Runtime:
        """The runtime around a model that `load` gave.

        Raises:
            ModelError: A part of the model cannot be tuned exactly in the method's scope.
            ConfigError: What runs it is not installed.
        """
        options = self.options
        if options.type == "torch":
            if options.threads is not None:
                torch.set_num_threads(options.threads)
            return EmbeddedRuntime(model, self.method, seed=self.seed, fold=options.fold, max_tokens=options.max_tokens)
        assert self.work is not None
        return EngineRuntime.start(self.model, model, self.method, seed=self.seed, options=options, work=self.work)
