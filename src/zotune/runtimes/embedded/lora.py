"""Fresh LoRA matrices to tune (Hu et al. 2022), added by PEFT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zotune.errors import ModelError

_QUERY_AND_VALUE = (("q_proj", "v_proj"), ("c_attn",), ("query_key_value",), ("qkv_proj",))
"""Names of the query and value projections, fused ones included, as model families have them."""


def add(model: PreTrainedModel, rank: int, alpha: int, seed: int) -> None:
    """Add LoRA to the query and value projections: A random, B zero, as in MeZO's code.

    Raises:
        ModelError: PEFT is not installed, or the model has no such projections.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ModelError("LoRA directions need PEFT: pip install 'zotune[peft]'") from error
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = next((names for names in _QUERY_AND_VALUE if leaves.issuperset(names)), None)
    if targets is None:
        known = ", ".join(" + ".join(names) for names in _QUERY_AND_VALUE)
        raise ModelError(f"{type(model).__name__} has no query and value projections known to zotune ({known})")
    fused = targets == ("c_attn",)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), fan_in_fan_out=fused)
    with torch.random.fork_rng(devices=[]):
        # Not that of GPUs, which would stay as it is set here.
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model)


def merge(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model with LoRA, as that of a model without: ``W + (alpha / rank) B A`` in place of ``W``."""
    from peft.tuners.lora import Linear

    merged = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            weight = merged[f"{name}.weight"]
            merged[f"{name}.weight"] = (weight.float() + module.get_delta_weight("default").float()).to(weight.dtype)
    return merged
