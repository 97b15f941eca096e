"""Tiny checkpoints in quantised formats, packed here, and the same models dequantised."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engines import HEAD_SIZE
from safetensors.torch import load_file, save_file
from tiny_checkpoint import write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from zotune.config import ModelConfig
from zotune.testing import tiny

GROUP = 32
"""Input columns that share a scale in the formats of four bits."""

Packed = tuple[dict[str, Tensor], Tensor]
"""A layer's tensors in the format, and the weight that they stand for."""

Rounding = Callable[[Tensor], Tensor]
"""How a format rounds what a layer gets."""

_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def model(dtype: torch.dtype = torch.bfloat16) -> Any:
    """A tiny Llama whose linear layers have widths that four-bit kernels take: multiples of 32."""
    config = tiny.config("llama", HEAD_SIZE)
    config.update({"hidden_size": 64, "intermediate_size": 64})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, parameter.shape[1] ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made.to(dtype).eval()


def quantise(made: Any, kind: str, folder: Path) -> tuple[ModelConfig, Any]:
    """Write a model with its linear layers quantised.

    Args:
        made: The model.
        kind: One of `FORMATS`.
        folder: Where to.

    Returns:
        The checkpoint, and in float32 the dequantised model. Where a format rounds what a layer gets as well, the
        stored weight sees it rounded, and what was learnt sees it as it is.
    """
    about, pack, rounded = FORMATS[kind]
    packed: dict[str, Tensor] = {}
    config, exact = write(made, folder), copy.deepcopy(made).float()
    for name, module in exact.named_modules():
        if isinstance(module, nn.Linear) and module is not exact.get_output_embeddings():
            tensors, plain = pack(made.get_submodule(name).weight.data)
            packed |= {f"{name}.{part}": tensor.contiguous() for part, tensor in tensors.items()}
            module.weight.data.copy_(plain)
            if rounded is not None:
                module.register_forward_hook(partial(_round_input, rounded, plain))
    linear = {name.rpartition(".")[0] for name in packed}
    kept = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in kept.items() if name.removesuffix(".weight") not in linear}
    save_file(kept | packed, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": about}))
    return config, exact


def _round_input(rounded: Rounding, stored: Tensor, module: nn.Module, given: tuple[Tensor], y: Tensor) -> Tensor:
    x = given[0].float()
    return (y + (rounded(x) - x) @ stored.T).to(y.dtype)


def _as_int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def _as_fp8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def _int8(weight: Tensor) -> Packed:
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).to(weight.dtype)
    whole = (weight.float() / scale.float()).round().clamp(-128, 127)
    return {"weight": whole.to(torch.int8), "weight_scale": scale}, whole * scale.float()


def _fp8(weight: Tensor) -> Packed:
    scale = weight.float().abs().max() / 448
    small = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": small, "weight_scale": scale.view(1)}, small.float() * scale


def _fp8_channel(weight: Tensor) -> Packed:
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    small = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": small, "weight_scale": scale}, small.float() * scale


def _fp8_block(weight: Tensor) -> Packed:
    blocks = [-(-extent // 128) for extent in weight.shape]
    tensors, plain = _fp8(weight)
    return {"weight": tensors["weight"], "weight_scale_inv": tensors["weight_scale"].expand(blocks)}, plain


def _nibbles(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Four-bit numbers 0 .. 15 ``(out, in)``, scales ``(out, groups)``, and what they stand for, offset by 8."""
    grouped = weight.float().unflatten(1, (-1, GROUP))
    scale = (grouped.abs().amax(2) / 7).to(weight.dtype)
    whole = (grouped / scale.float().unsqueeze(2)).round().clamp(-8, 7)
    return (whole + 8).flatten(1).to(torch.int32), scale, (whole * scale.float().unsqueeze(2)).flatten(1)


def _words(nibbles: Tensor) -> Tensor:
    """Eight numbers of the last axis in one int32, the first in the lowest bits."""
    eights = nibbles.to(torch.int64).unflatten(-1, (-1, 8))
    total = (eights << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def _int4(weight: Tensor) -> Packed:
    nibbles, scale, plain = _nibbles(weight)
    return {
        "weight_packed": _words(nibbles),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }, plain


def _gptq(weight: Tensor) -> Packed:
    nibbles, scale, plain = _nibbles(weight)
    # The format keeps zero points less one.
    zeros = _words(torch.full_like(scale.T, 7))
    groups = (torch.arange(weight.shape[1]) // GROUP).to(torch.int32)
    return {"qweight": _words(nibbles).T, "qzeros": zeros, "scales": scale.T, "g_idx": groups}, plain


def _awq(weight: Tensor) -> Packed:
    nibbles, scale, plain = _nibbles(weight)

    def interleaved(numbers: Tensor) -> Tensor:
        return _words(numbers.unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2))

    zeros = interleaved(torch.full_like(scale.T, 8))
    return {"qweight": interleaved(nibbles.T), "qzeros": zeros, "scales": scale.T}, plain


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


_SYMMETRIC = {"symmetric": True, "dynamic": False, "observer": "minmax"}
_DYNAMIC = {"strategy": "token", "symmetric": True, "dynamic": True}

FORMATS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Packed], Rounding | None]] = {
    "compressed-tensors W8A8": (
        _compressed(
            "int-quantized",
            {"num_bits": 8, "type": "int", "strategy": "channel", **_SYMMETRIC},
            {"num_bits": 8, "type": "int", **_DYNAMIC},
        ),
        _int8,
        _as_int8,
    ),
    "compressed-tensors W4A16": (
        _compressed(
            "pack-quantized",
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, **_SYMMETRIC},
            None,
        ),
        _int4,
        None,
    ),
    "compressed-tensors FP8": (
        _compressed(
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "channel", **_SYMMETRIC},
            {"num_bits": 8, "type": "float", **_DYNAMIC},
        ),
        _fp8_channel,
        _as_fp8,
    ),
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
        _gptq,
        None,
    ),
    "AWQ": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        _awq,
        None,
    ),
    "FP8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, _fp8, _as_fp8),
    "FP8 blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        _fp8_block,
        _as_fp8,
    ),
}
"""By name: what config.json says, how a layer is packed, and how its input is rounded, if it is."""
