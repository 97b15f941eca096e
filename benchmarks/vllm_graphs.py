"""How vLLM's forwards are best captured as CUDA graphs for steps: ways to do it start together and are timed in turn.

    PYTHONPATH=src python benchmarks/vllm_graphs.py --out vllm-graphs

A way is what vLLM's ``LLM`` is given besides; the first is what `zotune.runtimes.engine.launch` gives. All have one GPU
between them and a process each, since starting takes minutes and cores, and timing neither. Losses are compared: a
graph that is replayed for what it was not captured for is fast, too. ``WAY.txt`` says which kernels and functions a
step's time goes to.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import multiprocessing
import os
import pstats
import queue
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from zotune.bench import random_engine, random_rows, shapes
from zotune.bench.steps import Setting, Stepper, method_of
from zotune.bench.turns import seconds
from zotune.errors import ConfigError, ZotuneError, reason
from zotune.models import chosen_device
from zotune.runtimes.engine.runtime import Work

_ONE_SPLIT = {"attention_config": {"flash_attn_max_num_splits_for_cuda_graph": 1}}

WAYS: dict[str, dict[str, Any]] = {
    "piecewise": {},
    "full": {"compilation_config": {"cudagraph_mode": "FULL"}},
    "full-one-split": {"compilation_config": {"cudagraph_mode": "FULL"}, **_ONE_SPLIT},
    "full-not-compiled": {"compilation_config": {"cudagraph_mode": "FULL", "mode": 0}, **_ONE_SPLIT},
}
"""Graphs between attentions, as vLLM has them by itself; of whole forwards; without room for long contexts cut in
pieces, which are summed up; and without the compiler, which takes most of the start-up."""

_MEMORY = 0.9
"""Of the GPU, for all ways together."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-1.3b", help="a shape, with random weights")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64], help="examples per step")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=8, help="timed steps")
    parser.add_argument("--out", type=Path, default=Path("vllm-graphs"), help="folder of profiles")
    return parser.parse_args()


def ready(way: str, chosen: argparse.Namespace) -> Stepper:
    """An engine that steps."""
    method = method_of("all", rank=2, directions=1)
    network = shapes.network(chosen.model, getattr(torch, chosen.dtype), "meta")
    setting = Setting(network, random_rows.dataset(network.config.vocab_size), max(chosen.batches))
    works = [Work.of(setting.dataset, batch, method) for batch in chosen.batches]
    share = _MEMORY / len(chosen.ways)
    engine = random_engine.start(network, method, works, compile=True, memory_fraction=share, **WAYS[way])
    return Stepper(setting, method, engine, chosen_device())


def timed(stepper: Stepper, batch: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a step and of its kernels, and the losses of the first time round."""
    stepper.setting = replace(stepper.setting, batch_size=batch)
    losses = [stepper.step(number) for number in range(repeats)]
    for number in range(repeats):
        stepper.step(number)
    spent = [seconds(partial(stepper.step, number), stepper.device) for number in range(repeats)]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as kernels:
        for number in range(repeats):
            stepper.step(number)
    found = kernels.key_averages()
    busy = sum(each.self_device_time_total for each in found) / 1e3 / repeats
    table = found.table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=100)
    return {"step": 1e3 * median(spent), "kernels": busy, "losses": losses, "table": table}


def host(stepper: Stepper, repeats: int) -> str:
    """Which functions the host spends a step in."""
    with cProfile.Profile() as profiler:
        for number in range(repeats):
            stepper.step(number)
    text = io.StringIO()
    for order in ("tottime", "cumtime"):
        pstats.Stats(profiler, stream=text).sort_stats(order).print_stats(50)
    return text.getvalue()


def measure(way: str, chosen: argparse.Namespace, together: Any, alone: Any, answers: Any) -> None:
    """A process: start with the others, then be timed while none else is."""
    os.setsid()
    began, stepper, found = time.perf_counter(), None, {}
    try:
        stepper = ready(way, chosen)
        found["startup"] = time.perf_counter() - began
        meet(together)
        with alone:
            found |= {batch: timed(stepper, batch, chosen.repeats) for batch in chosen.batches}
            tables = [found[batch].pop("table") for batch in chosen.batches]
            text = "\n".join([*tables, host(stepper, chosen.repeats)])
            (chosen.out / f"{way}.txt").write_text(text, encoding="utf-8")
    except Exception as error:
        if not isinstance(error, ZotuneError):
            traceback.print_exc()
        found["failure"] = reason(error)
        if stepper is None:
            meet(together)
    answers.put((way, found))
    answers.close()
    answers.join_thread()
    # What the engine has started ends with it, and nothing else is to be kept.
    os.killpg(0, signal.SIGKILL)


def meet(together: Any) -> None:
    """Wait for all others, or until one is known to be dead."""
    with suppress(threading.BrokenBarrierError):
        together.wait()


def collected(processes: dict[str, Any], together: Any, answers: Any) -> dict[str, dict[Any, Any]]:
    """What every process found, or that it died."""
    found: dict[str, dict[Any, Any]] = {}
    while len(found) < len(processes):
        dead = [way for way, process in processes.items() if way not in found and not process.is_alive()]
        try:
            way, figures = answers.get(timeout=1)
            found[way] = figures
        except queue.Empty:
            for way in dead:
                found[way] = {"failure": f"its process ended with exit code {processes[way].exitcode}"}
                together.abort()
    return found


def report(found: dict[str, dict[Any, Any]], batches: list[int]) -> str:
    """A Markdown table; how far losses are from the first way's is relative."""
    first = next((each for each in found.values() if "failure" not in each), {})
    lines = [
        "| way | batch | step, ms | kernels, ms | losses apart, at most | start-up, s |",
        "|---|---|---|---|---|---|",
    ]
    for way, each in found.items():
        if "failure" in each:
            lines.append(f"| {way} | failed: {each['failure']} | | | | |")
            continue
        for batch in batches:
            mine, theirs = each[batch], first[batch]
            apart = max(abs(a - b) / abs(b) for a, b in zip(mine["losses"], theirs["losses"], strict=True))
            figures = f"{mine['step']:.2f} | {mine['kernels']:.2f} | {apart:.1e} | {each['startup']:.0f}"
            lines.append(f"| {way} | {batch} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    chosen = arguments()
    random_engine.require()
    if min(chosen.repeats, *chosen.batches) < 1:
        raise ConfigError(f"batches and repeats must be at least 1, got {[*chosen.batches, chosen.repeats]}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    together, alone, answers = context.Barrier(len(chosen.ways)), context.Lock(), context.Queue()
    processes = {
        way: context.Process(target=measure, args=(way, chosen, together, alone, answers)) for way in chosen.ways
    }
    for process in processes.values():
        process.start()
    found = collected(processes, together, answers)
    text = report({way: found[way] for way in chosen.ways}, chosen.batches)
    (chosen.out / "report.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if all("failure" in each for each in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except ZotuneError as error:
        sys.exit(f"error: {error}")
