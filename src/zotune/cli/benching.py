"""``zotune bench``: timings against the published procedure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from zotune.cli.program import AsJson, app, print_json

bench_app = typer.Typer(help="Time zotune against the published procedure.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


@bench_app.command("step")
def bench_step(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of a causal language model; default: the demo's.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with train and validation rows of SST-2; default: the demo's reviews.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float16, float32; auto: bfloat16 where the device multiplies it natively.")
    ] = "auto",
    baseline_dtype: Annotated[
        str | None, typer.Option(help="The same for the official procedure; default: equal.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 16,
    rank: Annotated[int, typer.Option(min=1, help="Rank of a direction.")] = 2,
    scope: Annotated[str, typer.Option(help="linear: weights of linear layers; all: every parameter.")] = "all",
    directions: Annotated[int, typer.Option(min=1, help="Two-point directions per step.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Steps to time of each, alternating.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: PyTorch's.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Also compare peak memory with bare inference.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time a whole training step against the official LOZO procedure on the same model, data and machine."""
    from zotune import bench

    report = bench.step(
        model=model,
        data=data,
        dtype=dtype,
        baseline_dtype=baseline_dtype,
        batch_size=batch_size,
        rank=rank,
        scope=scope,
        directions=directions,
        repeats=repeats,
        threads=threads,
        memory=memory,
    )
    if as_json:
        print_json(report.to_json())
    else:
        report.render(Console())


@bench_app.command("runtimes")
def bench_runtimes(
    runtimes: Annotated[
        str, typer.Option(help="torch, vllm, vllm-compiled (a minute or more to start), with commas.")
    ] = "torch,vllm",
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of a causal language model; default: the demo's.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with train and validation rows of SST-2; default: the demo's reviews.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float16, float32; auto: bfloat16 where the device multiplies it natively.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 16,
    rank: Annotated[int, typer.Option(min=1, help="Rank of a direction.")] = 2,
    scope: Annotated[str, typer.Option(help="linear: weights of linear layers; all: every parameter.")] = "all",
    directions: Annotated[int, typer.Option(min=1, help="Two-point directions per step.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Steps to time of each, alternating.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: PyTorch's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time the same step on several runtimes: step, share of the matmul peak, start-up, memory."""
    from zotune import bench

    report = bench.runtimes(
        [name.strip() for name in runtimes.split(",")],
        model=model,
        data=data,
        dtype=dtype,
        batch_size=batch_size,
        rank=rank,
        scope=scope,
        directions=directions,
        repeats=repeats,
        threads=threads,
    )
    if as_json:
        print_json(report.to_json())
    else:
        report.render(Console())
