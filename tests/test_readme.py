"""What the documents show works: Python blocks run, configurations parse, commands exist.

A block after the comment ``<!-- no-run -->`` is left out: it needs a model hub, a network or a real model.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from zotune import cli, config

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / "docs", ROOT / "benchmarks")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for folder in FOLDERS for path in sorted(folder.glob("*.md"))),
]
BLOCK = re.compile(r"^(?P<skip><!-- no-run -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = {"console", "bash", "sh"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")


def blocks(page: Path, *languages: str) -> list[str]:
    """The blocks of a page in some languages, those left out that are marked."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [match["code"] for match in found if match["language"] in languages and not match["skip"]]


def commands(text: str) -> list[list[str]]:
    """The zotune commands of shell lines, as words; continued lines joined."""
    lines = [line.strip().removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"zotune(\s|$)", line)]


def parse(words: list[str]) -> None:
    """Parse a command line as the program would, and stop short of running it; raises what the parser raises."""
    command: Any = get_command(cli.app)
    context = command.make_context(words[0], words[1:])
    while hasattr(command, "resolve_command"):
        rest = [*getattr(context, "_protected_args", []), *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


def test_the_finders_find() -> None:
    text = "```python\na\n```\n<!-- no-run -->\n```python\nb\n```\n\n```toml\nc\n```\n"
    assert [(match["skip"] is None, match["code"]) for match in BLOCK.finditer(text)] == [
        (True, "a\n"),
        (False, "b\n"),
        (True, "c\n"),
    ]
    assert commands("cd x\n$ zotune run a.toml \\\n  --json   # why\nzotunes\n") == [
        ["zotune", "run", "a.toml", "--json"]
    ]


@pytest.mark.parametrize(
    "line", ["zotune rnu a", "zotune run a --jsn", "zotune run", "zotune bench steps", "zotune resume a --steps x"]
)
def test_the_parser_refuses_what_the_program_would(line: str) -> None:
    with pytest.raises(Exception, match=r"No such|Missing|valid integer"):
        parse(line.split())


@pages
def test_commands_exist_with_their_options(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shown = [words for block in blocks(page, *SHELL) for words in commands(block)]
    shown += commands("\n".join(re.findall(r"^ {4}(?: {4})?(\S.*)$", text, re.MULTILINE)))
    # Inline, an argument in capitals stands for itself; brackets mark what may be left out.
    inline = [shlex.split(found.replace("[", "").replace("]", "")) for found in re.findall(r"`(zotune [^`\n]+)`", text)]
    for words in [*shown, *inline]:
        parse(words)


@pages
def test_configurations_parse(page: Path) -> None:
    smallest: dict[str, Any] = {"output": "runs/a", "model": {"path": "some/model"}, "data": {"train": "rows.jsonl"}}
    for block in blocks(page, "toml"):
        config.parse(smallest | tomllib.loads(block))


def test_the_configuration_that_is_shown_is_the_example() -> None:
    block = next(block for block in blocks(ROOT / "README.md", "toml") if block.startswith("output"))
    assert tomllib.loads(block) == tomllib.loads((ROOT / "examples" / "sentiment.toml").read_text(encoding="utf-8"))


@pages
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


@pages
def test_linked_files_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
