"""One side of the memory measurement; run by `zotune.bench.memory` as a process of its own."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from zotune.bench.steps import Setting, Stepper, method_of, prepare
from zotune.peak import forget_peak, peak_bytes
from zotune.presets import PRESETS
from zotune.testing.baselines.first_order import FirstOrder
from zotune.testing.baselines.official import collate

_STEPS = 3


def main(side: str, settings: dict[str, Any]) -> int:
    """Peak bytes of one side: ``zotune``, ``inference``, ``adamw`` or ``adamw-lora``."""
    torch.set_num_threads(settings.pop("threads"))
    method = method_of(settings.pop("scope"), settings.pop("rank"), settings.pop("directions"))
    setting = prepare(**settings)
    device = next(setting.model.parameters()).device
    forget_peak(device)
    if side == "inference":
        infer(setting)
    elif side == "zotune":
        stepper = Stepper(setting, method)
        for number in range(_STEPS):
            stepper.step(number)
        stepper.fold()
    else:
        backpropagate(setting, PRESETS["mezo-lora"].method.lora_rank if side == "adamw-lora" else None)
    return peak_bytes(device)


@torch.inference_mode()
def infer(setting: Setting) -> None:
    """The bare model over the padded batches, one sequence per example, without a cache."""
    device = next(setting.model.parameters()).device
    for number in range(_STEPS):
        batch = collate(setting.batch(number))
        first = torch.tensor(batch.sizes).cumsum(0) - torch.tensor(batch.sizes)
        ids, mask = batch.input_ids[first].to(device), batch.attention_mask[first].to(device)
        setting.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)


def backpropagate(setting: Setting, lora_rank: int | None) -> None:
    """AdamW on the same batches."""
    tuner = FirstOrder(setting.model, setting.dataset.objective, lr=1e-5, steps=_STEPS, lora_rank=lora_rank)
    for number in range(_STEPS):
        tuner.step(setting.batch(number))


if __name__ == "__main__":
    print(json.dumps({"peak_bytes": main(sys.argv[1], json.loads(sys.argv[2]))}))
