"""The program ``zotune bench``, and the options that its commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zotune.cli.program import app

bench_app = typer.Typer(help="Time zotune against the published procedure.", no_args_is_help=True)
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
Scope = Annotated[str, typer.Option(help="linear: weights of linear layers; all: every parameter.")]
Directions = Annotated[int, typer.Option(min=1, help="Two-point directions per step.")]
Repeats = Annotated[int, typer.Option(min=1, help="Steps to time of each, alternating.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: PyTorch's.")]

RESULTS = Path("bench-results")

Out = Annotated[Path, typer.Option(help="Folder of results; what is there already is not measured again.")]
Minutes = Annotated[float, typer.Option(min=0, help="Begin no case after so long; call again to go on.")]
Retry = Annotated[bool, typer.Option("--retry", help="Measure again what failed.")]


def words(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
