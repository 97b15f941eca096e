"""Commands that take a run elsewhere: ``export`` and ``apply``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zotune.cli.program import AsJson, RunPath, app, print_json
from zotune.figures import counted, size

if TYPE_CHECKING:
    from zotune.export import Exported

Out = Annotated[Path, typer.Option("--out", help="Where to write; must not exist.")]


@app.command()
def export(
    path: RunPath,
    out: Out,
    format: Annotated[
        str, typer.Option(help="merged: a Hugging Face folder; peft: a LoRA adapter; journal: one file for apply.")
    ] = "merged",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank of an adapter; default: what the change has, up to 512.")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(min=0.0, help="Largest relative Frobenius error of an adapter at any weight; default: 0.01."),
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Largest file of merged weights, e.g. 500MB; default: 5GB.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write what a run has learnt: merged weights, an adapter, or a small file of scalars."""
    from zotune.export import export_run

    done = export_run(path, out, format, rank=rank, max_error=max_error, shard_size=shard_size)
    _print(done, as_json)


@app.command("apply")
def apply_file(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or hub id of the base model.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What export --format journal wrote.")],
    out: Out,
    shard_size: Annotated[str, typer.Option(help="Largest file of weights, e.g. 500MB.")] = "5GB",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run modelling code that comes with the base model.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make the weights of a journal file from its base model, without data and without a forward pass."""
    from zotune.export import apply_journal

    done = apply_journal(base, file, out, shard_size=shard_size, trust_remote_code=trust_remote_code)
    _print(done, as_json)


def _print(done: Exported, as_json: bool) -> None:
    if as_json:
        print_json({**asdict(done), "path": str(done.path)})
        return
    what = {"merged": "a Hugging Face folder", "peft": "a PEFT adapter", "journal": "a journal file"}[done.format]
    steps = counted(done.steps, "step")
    typer.echo(f"{done.path}: {what} of {size(done.bytes)}, {steps}, made in {done.seconds:.1f} s")
    for note in done.notes:
        typer.echo(note)
