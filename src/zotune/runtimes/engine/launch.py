"""Starting and stopping stock vLLM with zotune's worker."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zotune import models
from zotune.config import ModelConfig
from zotune.errors import ModelError, ZotuneError, reason
from zotune.runtimes.engine import gate, layers, lifeline, memory, worker_settings

# vLLM's worker on a CPU puts something that does nothing in its place.
_set_num_threads = torch.set_num_threads

_CPU_BLOCK = 32
_CUDA_BLOCK = 16
_LEVEL, _QUIET = "VLLM_LOGGING_LEVEL", "ERROR"


def start(
    model: ModelConfig,
    settings: dict[str, Any],
    *,
    dtype: str,
    max_tokens: int,
    max_rows: int,
    longest: int,
    compile: bool | None = None,
    tensor_parallel: int = 1,
    own_process: bool = False,
    kv_bytes: int | None = None,
    weight_bytes: int = 0,
    batch_tokens: int | None = None,
    threads: int | None = None,
    memory_fraction: float = 0.9,
    **more: Any,
) -> Any:
    """Start vLLM on a checkpoint.

    Args:
        model: The checkpoint.
        settings: What `zotune.runtimes.engine.worker_settings.pack` wrote, for the workers.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        max_tokens: Most tokens of a forward.
        max_rows: Most sequences of a forward.
        longest: Most tokens of a sequence.
        compile: vLLM's compiler, and CUDA graphs; None: on CUDA only.
        tensor_parallel: Workers that share every layer.
        own_process: Whether the engine runs in a process of its own.
        kv_bytes: Of keys and values on each worker; None: what the forwards above need.
        weight_bytes: Of the model in that dtype, to be checked against what there is; 0: not known.
        batch_tokens: Tokens of a forward, as expected: what CUDA graphs are captured for.
        threads: CPU threads of all workers together; None: PyTorch's own choice.
        memory_fraction: Of a GPU's memory that vLLM may use.
        more: Further arguments of vLLM's ``LLM``.

    Returns:
        vLLM's ``LLM``.

    Raises:
        ConfigError: vLLM is not there, or not as it must be.
        ModelError: There is not enough memory, or vLLM cannot load the model.
    """
    with _environment(_unless_set({_LEVEL: _QUIET, "VLLM_LOGGING_STREAM": "ext://sys.stderr"})):
        _hush()
        gate.require()
        cuda = _is_cuda()
        block = _CUDA_BLOCK if cuda else _CPU_BLOCK
        shape = {"block": block, "tokens": max_tokens, "rows": max_rows, "longest": longest}
        kv_bytes = kv_bytes or _cache_bytes(model, dtype, shape, tensor_parallel)
        _demand(settings, dtype, weight_bytes, kv_bytes, tensor_parallel, cuda).check(
            memory.available(cuda, memory_fraction), "the GPU" if cuda else "this machine"
        )
        arguments: dict[str, Any] = {
            "model": models.folder_or_id(model.path),
            "revision": model.revision,
            "trust_remote_code": model.trust_remote_code,
            "dtype": dtype,
            "worker_cls": "zotune.runtimes.engine.internals.Worker",
            "additional_config": worker_settings.Carried(settings, layers.registered()),
            # Where vLLM has no implementation it would rewrite transformers' classes, for all of this process.
            "model_impl": "vllm",
            # A prefix that was computed before an update must never be taken for one after it.
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "max_num_batched_tokens": max_tokens,
            "max_num_seqs": max_rows,
            "max_model_len": longest,
            "block_size": block,
            "tensor_parallel_size": tensor_parallel,
            "kv_cache_memory_bytes": kv_bytes,
            "gpu_memory_utilization": memory_fraction,
            "seed": 0,
            **_compilation(cuda if compile is None else compile, cuda, batch_tokens, max_tokens),
            **more,
        }
        return _load(model.path, arguments, _processes(own_process, tensor_parallel, threads))


def stop(llm: Any) -> None:
    """Shut an engine down: its processes end, and this process may start another one."""
    llm.llm_engine.engine_core.shutdown()
    # Else the worker in there would keep the model, and what a GPU holds of it, until Python next looks for cycles.
    del llm.llm_engine
    _clean()


def _clean() -> None:
    """Give back what vLLM has taken of this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    torch.set_num_threads = _set_num_threads


def _load(path: str, arguments: dict[str, Any], processes: dict[str, str]) -> Any:
    """vLLM's ``LLM``; nothing is left of it where it fails."""
    from vllm import LLM

    before = _descendants()
    with _environment(processes | lifeline.driver()), _muted() as log:
        try:
            return LLM(**arguments)
        except BaseException as error:
            _end(_descendants() - before)
            _clean()
            if isinstance(error, ZotuneError) or not isinstance(error, Exception):
                raise
            found = _first_error(log) if len(processes) > 1 else None
            why = _short(found or reason(error))
            way = "Use another model, or runtime.type = 'torch'"
            if "does not support LoRA" in why:
                way = "Set runtime.vllm.adapters = 'none'"
            elif "GPU memory utilization" in why:
                # It wants all of its share to be free, however little of it the model takes.
                way = "Lower runtime.vllm.memory_fraction, or free some of the GPU's memory"
            raise ModelError(
                f"vLLM {gate.version()} cannot load the model {path!r}: {why}. {way}; {_LEVEL}=INFO shows what vLLM "
                "does."
            ) from error


def _processes(own_process: bool, workers: int, threads: int | None) -> dict[str, str]:
    """Environment that the engine's processes start with; in this process, its threads are set."""
    total = threads or torch.get_num_threads()
    if not own_process and workers == 1:
        if threads is not None:
            _set_num_threads(threads)
        return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    # Left to itself, vLLM pins threads and keeps cores free for a scheduler that has nothing to do here.
    return _unless_set({"VLLM_CPU_OMP_THREADS_BIND": "nobind"}) | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if own_process else "0",
        "OMP_NUM_THREADS": str(max(1, total // workers)),
    }


def _compilation(compile: bool, cuda: bool, batch_tokens: int | None, most: int) -> dict[str, Any]:
    if not (compile and cuda and batch_tokens):
        return {"enforce_eager": not compile}
    return {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": graph_sizes(batch_tokens, most)}}


def graph_sizes(batch_tokens: int, most: int) -> list[int]:
    """Numbers of tokens to capture CUDA graphs for, ascending: a forward is padded up to the next one.

    Powers of two serve generation. Batches differ in length, so from half of what is expected to a quarter above it the
    steps are a sixteenth of it, which bounds the padding. A larger batch is cut into forwards of at most ``most``
    tokens, and these are what is expected then.
    """
    batch_tokens = min(batch_tokens, most)
    step = max(8, -(-batch_tokens // 128) * 8)
    around = range(-(-batch_tokens // 2 // step) * step, batch_tokens * 5 // 4 + step, step)
    small = [1 << power for power in range(8)]
    return sorted({min(size, most) for size in (*small, *around)})


def _cache_bytes(model: ModelConfig, dtype: str, shape: Mapping[str, int], shards: int) -> int:
    config = models.load_config(model).get_text_config()
    return memory.cache_bytes(config, getattr(torch, dtype).itemsize, shards=shards, **shape)


def _demand(
    settings: Mapping[str, Any], dtype: str, weights: int, cache: int, workers: int, cuda: bool
) -> memory.Demand:
    """What the busiest GPU holds, or on a CPU all workers together."""
    factors = memory.factor_bytes(settings, getattr(torch, dtype).itemsize, shards=workers, host=not cuda)
    return (
        memory.Demand(weights // workers, factors, cache)
        if cuda
        else memory.Demand(weights, factors * workers, cache * workers)
    )


def _is_cuda() -> bool:
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def _hush() -> None:
    """Keep vLLM from speaking before it has set its logging up, and where that was done with another level."""
    if os.environ[_LEVEL] == _QUIET:
        logging.getLogger("vllm").setLevel(_QUIET)


@contextmanager
def _muted() -> Iterator[Path]:
    """Have what goes to stderr, from here and from processes that start meanwhile, in a file instead.

    vLLM's C++ code, its processes' tracebacks and what they import speak past every logger. Nothing is held back where
    the user has chosen vLLM's level.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        if os.environ[_LEVEL] != _QUIET:
            yield log
            return
        sys.stderr.flush()
        kept = os.dup(2)
        try:
            with log.open("wb") as file:
                os.dup2(file.fileno(), 2)
            yield log
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


def _first_error(log: Path) -> str | None:
    """What the first process that failed died of; the others died of that."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    found = (re.search(r"(?:^|\s)[\w.]*(?:Error|Exception): (.+)", line) for line in lines)
    return next((each.group(1) for each in found if each), None)


def _short(why: str) -> str:
    """A reason without what pydantic puts around it and without lists that fill a screen."""
    why = re.sub(r"^.*?Value error, ", "", why)
    why = re.sub(r" \[type=.*$| Supported architectures: .*$", "", why)
    return textwrap.shorten(why, 300, placeholder=" ...").rstrip(".")


def _descendants() -> set[Any]:
    """Processes below this one, but for Python's own helpers, which end with it."""
    import psutil

    found = set()
    for each in psutil.Process().children(recursive=True):
        try:
            if "multiprocessing.resource_tracker" not in " ".join(each.cmdline()):
                found.add(each)
        except psutil.Error:
            continue
    return found


def _end(processes: set[Any]) -> None:
    import psutil

    for each in processes:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)


def _unless_set(values: Mapping[str, str]) -> dict[str, str]:
    """These environment variables; the user's own values come first."""
    return {name: os.environ.get(name, value) for name, value in values.items()}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while; what vLLM adds for its processes to preload is taken back, too."""
    names = {*values, "LD_PRELOAD"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
