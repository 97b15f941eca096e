"""Commands that train: ``run``, ``resume`` and ``demo``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from zotune.cli.program import AsJson, RunPath, app, command_line, print_json, told_how_to_go_on
from zotune.figures import counted, duration, percent
from zotune.paths import expand
from zotune.progress import LastingConsole, TerminalReporter
from zotune.reporters import Reporter

if TYPE_CHECKING:
    from zotune.config import Config
    from zotune.evaluate import Metrics
    from zotune.train import Summary

TotalSteps = Annotated[int | None, typer.Option(min=1, help="Steps of the whole run.")]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration, a TOML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of CONFIG, e.g. train.steps=10. Repeatable."),
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Show rows, sites, memory and time, and train nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train as CONFIG says, into a new run directory."""
    from zotune import config as configuration

    chosen = configuration.load(config, overrides or ())
    if dry:
        _rehearse(chosen, as_json)
        return

    def work(live: Reporter) -> Summary:
        from zotune.train import start

        return start(chosen, live)

    _train(Path(chosen.output), work, as_json)


def _rehearse(chosen: Config, as_json: bool) -> None:
    from zotune.dryrun import dry_run

    found = dry_run(chosen)
    if as_json:
        print_json(found.record())
    else:
        shown = Text(str(found))
        shown.highlight_regex("⟦[^⟧]*⟧", "bold green")
        Console().print(shown, soft_wrap=True)


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


def _train(path: Path, work: Callable[[Reporter], Summary], as_json: bool) -> None:
    """Train with live progress, then draw the picture and print the outcome."""
    path = expand(path)
    console = LastingConsole(stderr=as_json)
    live = TerminalReporter(console)

    def hint() -> str:
        started = (path / "journal.jsonl").exists()
        return f"; go on with: {command_line('resume', path)}" if started else " before the first step"

    with told_how_to_go_on(hint):
        try:
            summary = work(live)
        finally:
            live.finish()
    from zotune.watching.plots import plot as draw

    picture = draw(summary.path)
    console.print(_outcome(summary, picture), markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print_json(_outcome_record(summary, picture))


def _outcome_record(summary: Summary, picture: Path) -> dict[str, Any]:
    return {
        "run": str(summary.path),
        "steps": summary.steps,
        "loss_before": summary.first.loss,
        "loss_after": summary.last.loss,
        "accuracy_before": summary.first.accuracy,
        "accuracy_after": summary.last.accuracy,
        "exact_match_before": summary.first.exact_match,
        "exact_match_after": summary.last.exact_match,
        "f1_before": summary.first.f1,
        "f1_after": summary.last.f1,
        "examples": summary.last.examples,
        "train_seconds": summary.seconds,
        "skipped": summary.skipped,
        "best_step": summary.best,
        "stopped": summary.stopped,
        "plot": str(picture),
    }


def _outcome(summary: Summary, picture: Path) -> str:
    """The closing text of a training command."""
    first, last = summary.first, summary.last
    skipped = f", {summary.skipped} skipped" if summary.skipped else ""
    stopped = ", stopped early" if summary.stopped else ""
    better = summary.best is not None and 0 < summary.best < summary.steps
    best = [f"best      step {summary.best}: {command_line('eval', summary.path, '--best')}"] if better else []
    return "\n".join(
        (
            "",
            f"{'on ' + counted(last.examples, 'validation row'):24}{'before':>10} {'after':>10}",
            *_before_and_after(first, last),
            "",
            f"{counted(summary.steps, 'step')}{skipped}{stopped}, {duration(summary.seconds)} of training",
            f"picture   {picture}",
            *best,
            f"evaluate  {command_line('eval', summary.path)}",
            f"resume    {_way_on(summary)}",
        )
    )


def _before_and_after(first: Metrics, last: Metrics) -> list[str]:
    lines = [f"{'loss':24}{first.loss:>10.3f} {last.loss:>10.3f}"]
    before, after = first.shares, last.shares
    lines += [f"{name:24}{percent(before[name]):>10} {percent(after[name]):>10}" for name in before if name in after]
    return lines


def _way_on(summary: Summary) -> str:
    """What makes the run longer: to twice its length, where its learning rate has not run out."""
    from zotune import config, presets

    file = summary.path / "config.toml"
    if summary.stopped:
        return f"raise train.patience in {file}, then {command_line('resume', summary.path)}"
    method = presets.resolve(config.load(file).method)
    extension = ("--steps", str(2 * summary.steps)) if method.schedule == "constant" else ()
    return command_line("resume", summary.path, *extension)
