"""Two versions of zotune, or zotune and a peer's procedure, step by step in turn.

Each side has a process of its own, and both take the same batches. A machine that is faster in one minute than in the
next is so for both, so what counts is the median of the pairs' ratios.

    python benchmarks/pairs.py OLD NEW --data data/sst2 --dtype bfloat16 --pairs 60
    python benchmarks/pairs.py official . --data data/sst2 --dtype bfloat16 --pairs 40

OLD and NEW are checkouts, such as `git worktree add ../old COMMIT` makes. `official` is the published LOZO procedure,
`lora-slots` and `public-api` are others' ways through vLLM, from the other side's checkout
(`zotune.testing.baselines`). A step is as `zotune bench step` times it, without the share of a fold.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OFFICIAL = "official"
PEERS = (OFFICIAL, "lora-slots", "public-api")
_READY = "ready"
_WARM_UP = 3


class Side:
    """A process that takes a step whenever it is told to.

    Args:
        checkout: Whose sources it runs.
        chosen: The command line.
        runtime: What takes its steps.
    """

    def __init__(self, checkout: Path, chosen: argparse.Namespace, runtime: str) -> None:
        given = {"model": chosen.model, "data": chosen.data, "dtype": chosen.dtype, "batch_size": chosen.batch_size}
        method = {"scope": chosen.scope, "rank": chosen.rank, "directions": chosen.directions}
        environment = dict(os.environ, PYTHONPATH=str(checkout / "src"))
        if chosen.threads is not None:
            environment["OMP_NUM_THREADS"] = str(chosen.threads)
        command = [sys.executable, __file__, "--work", json.dumps([runtime, given, method])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.seconds: list[float] = []
        self._await(_READY)

    def take(self, number: int) -> None:
        """One step on the batch of this number."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        self.seconds.append(float(self._await("step ")))

    def _await(self, start: str) -> str:
        """The rest of the next line that starts so; libraries print lines, too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line.removeprefix(start)
        sys.exit(f"error: a side ended with exit code {self._process.wait()}; its own words are above")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def work(runtime: str, given: dict[str, Any], method: dict[str, Any]) -> None:
    """What runs in a side's process."""
    from importlib import import_module

    # By name, because the package's attributes of these names are functions.
    steps, runtimes = import_module("zotune.bench.steps"), import_module("zotune.bench.runtimes")
    kept = steps.method_of(**method)
    setting = runtimes.prepare("torch" if runtime == OFFICIAL else runtime, given)
    if runtime == OFFICIAL:
        official = steps.official_of(setting.model, kept)

        def step(number: int) -> None:
            official.step(setting.batch(number))
    else:
        step = steps.Stepper(setting, kept, runtimes.start(runtime, setting, kept)).step
    for number in range(_WARM_UP):
        step(number)
    print(_READY, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        step(int(line))
        print(f"step {time.perf_counter() - began}", flush=True)


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both sides and the ratios of pairs."""
    names = chosen.old, chosen.new
    checkouts = [Path(name).resolve() for name in names if name not in PEERS]
    if not checkouts or not all((each / "src" / "zotune").is_dir() for each in checkouts):
        sys.exit(f"error: got {names[0]} and {names[1]}; give a checkout of zotune, and another or one of {PEERS}")
    sides = [
        Side(checkouts[0], chosen, name) if name in PEERS else Side(Path(name).resolve(), chosen, chosen.runtime)
        for name in names
    ]
    for pair in range(chosen.pairs):
        for side in sides if pair % 2 else sides[::-1]:
            side.take(_WARM_UP + pair)
    for side in sides:
        side.close()
    ratios = [old / new for old, new in zip(*(side.seconds for side in sides), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    figures = {"old_s": statistics.median(sides[0].seconds), "new_s": statistics.median(sides[1].seconds)}
    return {**figures, "ratio": middle, "quartiles": [low, high], "pairs": len(ratios), "command": sys.argv[1:]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help=f"a checkout, or one of {', '.join(PEERS)}")
    parser.add_argument("new", help="the same")
    parser.add_argument("--model", help="hub id or folder; default: the demonstration's")
    parser.add_argument("--data", help="folder with SST-2's train.jsonl and validation.jsonl; default: reviews")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runtime", default="torch", choices=["torch", "vllm", "vllm-compiled"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--scope", default="all", choices=["all", "linear", "last-layers"])
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--directions", type=int, default=1)
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's")
    parser.add_argument("--pairs", type=int, default=40)
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*json.loads(sys.argv[2]))
    else:
        print(json.dumps(measure(arguments())))
