"""The program ``zotune bench``, and the options that its commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from zotune.cli.program import app, print_json
from zotune.errors import ConfigError

if TYPE_CHECKING:
    from zotune.bench import Plan, RuntimesReport, StepReport
    from zotune.bench.cluster_report import ClusterReport

bench_app = typer.Typer(
    help="Time zotune against the published procedure.\n\n"
    "Of several cases one that fails is a result: it is told and kept, the others go on, and the exit code is 0. What "
    "nothing can be measured with is refused, with exit code 2.",
    no_args_is_help=True,
)
app.add_typer(bench_app, name="bench")

ModelPath = Annotated[
    str | None, typer.Option("--model", help="Hub id or folder of a causal language model; default: the demo's.")
]
DataFolder = Annotated[
    Path | None,
    typer.Option("--data", help="Folder with train and validation rows of SST-2; default: the demo's reviews."),
]
Dtype = Annotated[
    str, typer.Option(help="bfloat16, float16, float32; auto: bfloat16 where the device multiplies it natively.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples per step.")]
Rank = Annotated[int, typer.Option(min=1, help="Rank of a direction.")]
Scope = Annotated[
    str,
    typer.Option(
        help="linear: weights of linear layers; all: every parameter; last-layers: two fifths of the layers in turn."
    ),
]
Directions = Annotated[int, typer.Option(min=1, help="Two-point directions per step.")]
Repeats = Annotated[int, typer.Option(min=1, help="Steps to time of each, alternating.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: PyTorch's.")]

RESULTS = Path("bench-results")
Number = TypeVar("Number", int, float)

Models = Annotated[
    str, typer.Option(help="Shapes like opt-13b, llama-3.2-1b, qwen3-4b, with commas; an unknown one lists them all.")
]
Batches = Annotated[str, typer.Option(help="Examples per step, numbers with commas.")]
DirectionCounts = Annotated[str, typer.Option("--directions", help="Two-point directions per step, with commas.")]
Ranks = Annotated[str, typer.Option(help="Ranks of a direction, with commas.")]
Scopes = Annotated[str, typer.Option(help="linear, all, last-layers, with commas.")]
Out = Annotated[Path, typer.Option(help="Folder of results; what is there already is not measured again.")]
Minutes = Annotated[float, typer.Option(min=0, help="Begin no case after so long; call again to go on.")]
Retry = Annotated[bool, typer.Option("--retry", help="Measure again what failed.")]


def words(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def plan(
    *,
    models: str,
    runtimes: str,
    batches: str,
    directions: str,
    ranks: str,
    scopes: str,
    dtype: str,
    threads: int | None,
) -> Plan:
    """The plan of a long benchmark, from lists with commas; see `zotune.bench.Plan`.

    Raises:
        ConfigError: What should be numbers is not, or as for the plan.
    """
    from zotune import bench

    return bench.Plan(
        models=words(models),
        runtimes=words(runtimes),
        batches=numbers(int, batches, "--batches"),
        directions=numbers(int, directions, "--directions"),
        ranks=numbers(int, ranks, "--ranks"),
        scopes=words(scopes),
        dtype=dtype,
        threads=threads,
    )


def numbers(kind: Callable[[str], Number], text: str, option: str) -> list[Number]:
    """The numbers in a list with commas.

    Raises:
        ConfigError: One of them is none.
    """
    try:
        return [kind(word) for word in words(text)]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{option}: got {text!r}; give {what} with commas between them") from None


def show(report: StepReport | RuntimesReport | ClusterReport, as_json: bool) -> None:
    """Print a report: as one line of JSON, or as tables."""
    if as_json:
        print_json(report.to_json())
    else:
        report.render(Console())
