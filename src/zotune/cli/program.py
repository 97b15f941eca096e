"""The program ``zotune``: what all of its commands share.

Whatever needs PyTorch or matplotlib is imported inside the command that needs it, so that ``--help`` is instant.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from zotune.errors import ZotuneError, reason
from zotune.figures import as_json
from zotune.signals import Terminated, terminable

USER_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON line on stdout and all else on stderr.")]


class Commands(TyperGroup):
    """Ends a user's mistake and Ctrl-C with one line and an exit code instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that ``ctx`` names."""
        try:
            return super().invoke(ctx)
        except ZotuneError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(USER_ERROR) from None
        except BrokenPipeError:
            # Nobody reads on, as after `| head`; typer ends quietly.
            raise
        # What a system refuses, names with its reason: a folder that is closed, a name that is too long, a full disk.
        except OSError as error:
            typer.echo(f"error: {reason(error)}", err=True)
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


def main() -> None:
    """Entry point of the ``zotune`` program."""
    # A terminal or a log that knows no ± or ━ shows a question mark for it.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
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


@contextmanager
def told_how_to_go_on(hint: Callable[[], str]) -> Iterator[None]:
    """End Ctrl-C and SIGTERM with one line, which ``hint`` completes, and their exit codes."""
    try:
        with terminable():
            yield
    except (KeyboardInterrupt, Terminated) as end:
        word, code = ("terminated", TERMINATED) if isinstance(end, Terminated) else ("interrupted", INTERRUPTED)
        typer.echo(f"{word}{hint()}", err=True)
        raise typer.Exit(code) from None


def command_line(*words: str | Path) -> str:
    """A command line of this very program, quoted for the shell."""
    program = [sys.argv[0]]
    if Path(program[0]).parts[-2:] == ("zotune", "__main__.py") and shutil.which("zotune") is None:
        program = [sys.executable, "-m", "zotune"]
    elif Path(program[0]).stem != "zotune" or shutil.which("zotune") == program[0]:
        program = ["zotune"]
    return shlex.join([*program, *map(str, words)])


def plain_table(*headings: str, below: int = 0) -> Table:
    """A table without lines, whose rows have so many empty lines below them."""
    return Table(*headings, box=None, padding=(0, 2, below, 0), pad_edge=False)


def plain_console() -> Console:
    """Prints on stdout what it is given, as it is: a path in brackets is no markup."""
    return Console(highlight=False, markup=False)


def print_json(record: Mapping[str, Any]) -> None:
    """One line of JSON, with null for numbers that are not finite."""
    typer.echo(json.dumps(as_json(record)))
