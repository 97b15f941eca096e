"""The table of a GPU: steps of OPT-1.3B to OPT-13B on every runtime, against the official LOZO step on the same card.

It is `zotune bench scaling`, `overhead` and `report` in one command, for a machine that has torch, transformers,
pydantic and rich, but neither zotune installed nor what its command line and its pictures need.

    PYTHONPATH=src python benchmarks/gpu_steps.py --out gpu-steps
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

from zotune.bench import Plan, overhead, random_engine, report, scaling
from zotune.bench.results import every
from zotune.bench.sides import OFFICIAL
from zotune.errors import ZotuneError

PARTS = ("scaling", "overhead")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 32, 64, 128], help="examples per step")
    parser.add_argument(
        "--runtimes", nargs="+", default=["torch", "vllm", "vllm-compiled"], help="besides the official step"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="steps as wholes, and by their phases")
    parser.add_argument("--out", type=Path, default=Path("gpu-steps"), help="folder of results")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps per case, of the official procedure too")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after so long; call again")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    return parser.parse_args()


def measure(model: str, runtimes: list[str], chosen: argparse.Namespace, began: float) -> None:
    """All that is wanted of a model and has no result yet; every side on the same batches."""

    def options() -> dict[str, Any]:
        left = max(0.0, chosen.minutes - (time.monotonic() - began) / 60)
        return {"folder": chosen.out, "repeats": chosen.repeats, "minutes": left, "retry": chosen.retry}

    if "scaling" in chosen.parts:
        scaling(Plan([model], [OFFICIAL], chosen.batches), **options())
        scaling(Plan([model], runtimes, chosen.batches), **options())
    if "overhead" in chosen.parts:
        overhead(Plan([model], runtimes, chosen.batches[:1]), **options())


def main() -> None:
    chosen, began = arguments(), time.monotonic()
    runtimes = chosen.runtimes
    if not random_engine.is_installed():
        print("vLLM is not installed, so it is left out: pip install 'zotune[vllm]'", file=sys.stderr)
        runtimes = [name for name in runtimes if not name.startswith("vllm")]
    for model in chosen.models:
        measure(model, runtimes, chosen, began)
    text = report.markdown(report.sections(every(chosen.out)), pictures=False)
    (chosen.out / "report.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except ZotuneError as error:
        sys.exit(f"error: {error}")
