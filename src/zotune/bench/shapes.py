"""Models from their configurations alone: published widths and depths, random weights, nothing to download."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from zotune.errors import ConfigError, unknown


def _opt(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    shape = {"hidden_size": width, "ffn_dim": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    common = {"vocab_size": 50272, "word_embed_proj_dim": width, "dropout": 0.0}
    return {"model_type": "opt", **common, **shape, **more}


def _decoder(family: str, width: int, inner: int, layers: int, heads: int, keys: int, **more: Any) -> dict[str, Any]:
    """A decoder with gated layers: ``heads`` of queries share ``keys`` heads of keys and values."""
    shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": width // heads}
    return {"model_type": family, "tie_word_embeddings": True, **shape, **heads_of, **more}


_LLAMA3 = {"vocab_size": 128256, "rms_norm_eps": 1e-5}
_QWEN3 = {"vocab_size": 151936, "rms_norm_eps": 1e-6, "head_dim": 128}
_TINY = {"vocab_size": 256, "max_position_embeddings": 128, "head_dim": 32}
_UNTIED = {"tie_word_embeddings": False}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "smollm2-135m": _decoder("llama", 576, 1536, 30, 9, 3, vocab_size=49152, rms_norm_eps=1e-5),
    "llama-3.2-1b": _decoder("llama", 2048, 8192, 16, 32, 8, **_LLAMA3),
    "llama-3.2-3b": _decoder("llama", 3072, 8192, 28, 24, 8, **_LLAMA3),
    "llama-3.1-8b": _decoder("llama", 4096, 14336, 32, 32, 8, **_LLAMA3, **_UNTIED),
    "qwen3-0.6b": _decoder("qwen3", 1024, 3072, 28, 16, 8, **_QWEN3),
    "qwen3-1.7b": _decoder("qwen3", 2048, 6144, 28, 16, 8, **_QWEN3),
    "qwen3-4b": _decoder("qwen3", 2560, 9728, 36, 32, 8, **_QWEN3),
    "qwen3-8b": _decoder("qwen3", 4096, 12288, 36, 32, 8, **_QWEN3, **_UNTIED),
    "tiny-opt": _opt(128, 2, 4, vocab_size=256),
    "tiny-llama": _decoder("llama", 128, 192, 2, 4, 2, **_TINY),
    "tiny-qwen3": _decoder("qwen3", 128, 192, 3, 4, 2, **_TINY),
}
"""What `network` takes: released models by their own sizes, and tiny ones to try a benchmark with."""


def check(name: str) -> None:
    """Refuse an unknown shape with a `ConfigError`."""
    if name not in SHAPES:
        raise ConfigError(unknown("model shape", name, SHAPES))


def config(name: str) -> PretrainedConfig:
    """The transformers configuration of a shape.

    Raises:
        ConfigError: No such shape.
    """
    check(name)
    values = dict(SHAPES[name])
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def network(name: str, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """A causal language model of this shape in evaluation mode; its weights are random, the same every time.

    Args:
        name: Of `SHAPES`.
        dtype: Of all weights.
        device: Where they are; on ``meta`` matrices take no memory, and vectors are ones on the CPU.

    Raises:
        ConfigError: No such shape.
    """
    chosen = config(name)
    devices = [torch.cuda.current_device()] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(0)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(chosen, dtype=dtype).eval()
    chosen.architectures = [type(made).__name__]
    _give_vectors(made)
    return made


def _give_vectors(model: nn.Module) -> None:
    # What a normalisation does is found out by trying it, which needs its weights.
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and parameter.dim() == 1:
                module.register_parameter(name, nn.Parameter(torch.ones(parameter.shape, dtype=parameter.dtype)))


@cache
def parameters(name: str) -> int:
    """How many parameters a shape has, tied ones counted once."""
    return sum(parameter.numel() for parameter in network(name, torch.bfloat16, "meta").parameters())
