"""Starting stock vLLM with zotune's worker."""

from __future__ import annotations

import os
from typing import Any

from zotune.config import ModelConfig


def start(model: ModelConfig, settings: dict[str, Any], *, dtype: str, max_tokens: int, max_rows: int, longest: int,
          compile: bool = False, tensor_parallel: int = 1, own_process: bool = False, kv_bytes: int) -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if own_process else "0"
    from vllm import LLM
    return LLM(
        model=model.path, revision=model.revision, trust_remote_code=model.trust_remote_code, dtype=dtype,
        worker_cls="zotune.runtimes.engine.internals.Worker",
        additional_config={"zotune": settings},
        enforce_eager=not compile, enable_prefix_caching=False, disable_log_stats=True,
        max_num_batched_tokens=max_tokens, max_num_seqs=max_rows, max_model_len=longest,
        tensor_parallel_size=tensor_parallel, kv_cache_memory_bytes=kv_bytes, seed=0,
    )
