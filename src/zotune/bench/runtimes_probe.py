"""Start-up time and peak memory of one runtime; run by `zotune.bench.runtimes` as a process of its own."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from zotune.bench.runtimes import prepare, start
from zotune.bench.steps import Stepper, method_of
from zotune.models import chosen_device
from zotune.peak import forget_peak, peak_bytes

_STEPS = 3


def main(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Start the runtime, take a few steps and fold."""
    torch.set_num_threads(settings.pop("threads"))
    method = method_of(settings.pop("scope"), settings.pop("rank"), settings.pop("directions"))
    device = chosen_device()
    forget_peak(device)
    began = time.perf_counter()
    setting = prepare(name, settings)
    runtime = start(name, setting, method)
    took = time.perf_counter() - began
    with closing(runtime):
        stepper = Stepper(setting, method, runtime)
        # As in a run, which keeps the model only where it is the runtime's own.
        stepper.setting = setting = replace(setting, model=None)
        for number in range(_STEPS):
            stepper.step(number)
        stepper.fold()
        return {"startup_s": took, "peak_bytes": peak_bytes(device)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
