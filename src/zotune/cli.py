"""The command line: ``zotune run``, ``resume``, ``eval``, ``plot``, ``presets``, ``demo`` and ``bench step``.

Whatever needs PyTorch or matplotlib is imported inside the command that needs it, so that ``--help`` is instant.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from zotune.errors import ZotuneError
from zotune.progress import Reporter, duration, percent, reporter

if TYPE_CHECKING:
    from zotune.evaluate import Metrics
    from zotune.presets import Preset
    from zotune.train import Summary

USER_ERROR = 2
INTERRUPTED = 130

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON line on stdout and all else on stderr.")]
TotalSteps = Annotated[int | None, typer.Option(min=1, help="Steps of the whole run.")]


class Commands(TyperGroup):
    """Ends a user's mistake and Ctrl-C with one line and an exit code instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that ``ctx`` names."""
        try:
            return super().invoke(ctx)
        except (ZotuneError, PermissionError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    help="Fine-tune language models with forward passes only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(help="Time zotune against the published procedure.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Entry point of the ``zotune`` program."""
    app(prog_name="zotune")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        try:
            typer.echo(f"zotune {metadata.version('zotune')}")
        except metadata.PackageNotFoundError:
            typer.echo("zotune (from source, not installed)")
        raise typer.Exit


@app.callback()
def _before_every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    # Read when the libraries are imported, which is later; a user's own settings win.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration, a TOML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of CONFIG, e.g. train.steps=10. Repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train as CONFIG says, into a new run directory."""
    from zotune import config as configuration

    chosen = configuration.load(config, overrides or ())

    def work(live: Reporter) -> Summary:
        from zotune.train import start

        return start(chosen, live)

    _train(Path(chosen.output), work, as_json)


@app.command()
def resume(path: RunPath, steps: TotalSteps = None, as_json: AsJson = False) -> None:
    """Go on with a run from its last finished step, or extend it to more [bold]--steps[/bold]."""

    def work(live: Reporter) -> Summary:
        from zotune.train import resume as resume_run

        return resume_run(path, live, steps)

    _train(path, work, as_json)


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option(help="Run directory; must not exist. Default: the first free runs/demo, demo-2, ...")
    ] = None,
    steps: TotalSteps = None,
    as_json: AsJson = False,
) -> None:
    """Teach a small model to tell good film reviews from bad ones, on the CPU, in minutes."""
    from zotune import demo

    path = output or demo.free_output()

    def work(live: Reporter) -> Summary:
        from zotune.train import start

        assets = demo.fetch(notice=live.notice)
        chosen = demo.config(assets, path) if steps is None else demo.config(assets, path, steps)
        return start(chosen, live)

    _train(path, work, as_json)


@app.command("eval")
def evaluate(path: RunPath, as_json: AsJson = False) -> None:
    """Evaluate the newest weights of a run on its validation rows."""
    from zotune.train import evaluate_run

    metrics = evaluate_run(path)
    if as_json:
        _print_json({"run": str(path), **asdict(metrics)})
    else:
        accuracy = "" if metrics.accuracy is None else f"  accuracy {percent(metrics.accuracy)}"
        typer.echo(f"loss {metrics.loss:.3f}{accuracy}  on {metrics.examples} validation rows")


@app.command()
def plot(path: RunPath, as_json: AsJson = False) -> None:
    """Draw loss and accuracy of a run into RUN/curves.png."""
    from zotune.plots import plot as draw

    picture = draw(path)
    if as_json:
        _print_json({"run": str(path), "plot": str(picture)})
    else:
        typer.echo(picture)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show all about this one.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, with their sources and defaults."""
    from zotune.presets import PRESETS, get

    if name is not None:
        preset = get(name)
        typer.echo(json.dumps(asdict(preset)) if as_json else _describe(preset))
    elif as_json:
        typer.echo(json.dumps([asdict(preset) for preset in PRESETS.values()]))
    else:
        Console(highlight=False, markup=False).print(_table(PRESETS.values()))


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
        _print_json(report.to_json())
    else:
        report.render(Console())


def _train(path: Path, work: Callable[[Reporter], Summary], as_json: bool) -> None:
    """Train with live progress, then draw the picture and print the outcome."""
    console = Console(stderr=as_json)
    live = reporter(console)
    try:
        summary = work(live)
    except KeyboardInterrupt:
        live.finish()
        started = (path / "journal.jsonl").exists()
        hint = f"; go on with: {_command('resume', path)}" if started else " before the first step"
        typer.echo(f"interrupted{hint}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        live.finish()
    from zotune.plots import plot as draw

    picture = draw(summary.path)
    console.print(_outcome(summary, picture), markup=False, highlight=False, soft_wrap=True)
    if as_json:
        _print_json(_outcome_record(summary, picture))


def _outcome_record(summary: Summary, picture: Path) -> dict[str, Any]:
    return {
        "run": str(summary.path),
        "steps": summary.steps,
        "loss_before": summary.first.loss,
        "loss_after": summary.last.loss,
        "accuracy_before": summary.first.accuracy,
        "accuracy_after": summary.last.accuracy,
        "examples": summary.last.examples,
        "train_seconds": summary.seconds,
        "skipped": summary.skipped,
        "plot": str(picture),
    }


def _outcome(summary: Summary, picture: Path) -> str:
    """The closing text of a training command."""
    first, last = summary.first, summary.last
    skipped = f", {summary.skipped} skipped" if summary.skipped else ""
    return "\n".join(
        (
            "",
            f"on {last.examples} validation rows     before      after",
            *_before_and_after(first, last),
            "",
            f"{summary.steps} steps{skipped}, {duration(summary.seconds)} of training",
            f"picture   {picture}",
            f"evaluate  {_command('eval', summary.path)}",
            f"resume    {_command('resume', summary.path, *_extension(summary))}",
        )
    )


def _before_and_after(first: Metrics, last: Metrics) -> list[str]:
    lines = [f"{'loss':24}{first.loss:>10.3f} {last.loss:>10.3f}"]
    if first.accuracy is not None and last.accuracy is not None:
        lines.append(f"{'accuracy':24}{percent(first.accuracy):>10} {percent(last.accuracy):>10}")
    return lines


def _extension(summary: Summary) -> tuple[str, ...]:
    """Arguments that extend a finished run to twice its length, where its learning rate has not run out."""
    from zotune import config, presets

    method = presets.resolve(config.load(summary.path / "config.toml").method)
    return ("--steps", str(2 * summary.steps)) if method.schedule == "constant" else ()


def _command(*words: str | Path) -> str:
    """A command line of this very program, quoted for the shell."""
    program = sys.argv[0]
    if Path(program).stem != "zotune" or shutil.which("zotune") == program:
        program = "zotune"
    return shlex.join([program, *map(str, words)])


def _print_json(record: Mapping[str, Any]) -> None:
    """One line of JSON, with null for numbers that are not finite."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    typer.echo(json.dumps(clean))


def _table(listed: Iterable[Preset]) -> Table:
    table = Table("preset", "what it does", "main defaults", "source", box=None, padding=(0, 2, 1, 0))
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    for preset in listed:
        values = _defaults(preset)
        shown = [f"{key} = {values[key]}" for key in ("lr", "eps", "rank", "interval", "momentum") if values.get(key)]
        table.add_row(preset.name, preset.summary, "\n".join(shown), preset.citation)
    return table


def _describe(preset: Preset) -> str:
    return "\n".join(
        (
            f"{preset.name}: {preset.summary}",
            f"source: {preset.citation}",
            "defaults:",
            *(f"  {key} = {value}" for key, value in _defaults(preset).items()),
            "deviations from the published method:",
            *(f"  {line}" for line in preset.deviations or ("none",)),
        )
    )


def _defaults(preset: Preset) -> dict[str, Any]:
    """The preset's values that have a meaning for it."""
    values = asdict(preset.method)
    hidden = set() if values["family"] == "low-rank" else {"rank", "interval", "normalised", "momentum"}
    if values["lora_rank"] is None:
        hidden |= {"lora_rank", "lora_alpha"}
    return {key: value for key, value in values.items() if key not in hidden}
