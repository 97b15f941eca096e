from __future__ import annotations

import itertools
import math
import re
import runpy
import sys
from pathlib import Path

import pytest

from zotune import config, presets
from zotune.data.forms import form

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_the_flat_loop_lowers_the_loss(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "flat_loop.py", tiny_model_folder)
    lines = capsys.readouterr().out.splitlines()
    losses = [float(re.fullmatch(rf"step {n}  loss (\S+)", line)[1]) for n, line in enumerate(lines, start=1)]
    assert len(losses) == 200
    assert all(map(math.isfinite, losses))
    assert sum(losses[-20:]) < sum(losses[:20])


def test_the_flat_loop_fits_a_screen_and_uses_public_names_alone() -> None:
    code = (EXAMPLES / "flat_loop.py").read_text()
    assert len(code.splitlines()) <= 45
    assert "from zotune" not in code
    assert "import zotune." not in code


def test_a_run_from_python(
    tiny_model_folder: Path,
    sentiment_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(monkeypatch, "api.py", tiny_model_folder, sentiment_files[0])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["choosing the learning rate by probes on 32 batches", "run runs/api: 200 steps"]
    assert re.fullmatch(r"loss \S+ -> \S+ in \d+ s; picture: runs/api/curves\.png", lines[-1])
    assert (tmp_path / "runs" / "api" / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_an_example_configuration_says_something_that_can_be_done(path: Path) -> None:
    chosen = config.load(path)
    assert type(form(chosen.data)).__name__ == {"sentiment": "Classification", "completions": "Completion"}[path.stem]
    assert chosen.method.lr in (presets.resolve(chosen.method).lr, "auto")
    assert f"zotune run examples/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_an_example_configuration_trains(path: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    """As it is, but for the model and the length of the run."""
    import zotune

    # Rows that differ in words that the tiny model's tokenizer knows, since equal rows are never held out.
    starts = itertools.islice(itertools.product(("the", "a", "film", "plot", "cast", "is", "was"), repeat=4), 600)
    rows = [
        {"text": f"{' '.join(start)} {word}", "label": i} for start in starts for i, word in enumerate(("dull", "fine"))
    ]
    answers = [{"question": f"the {noun}", "answer": "is fine"} for noun in ("film", "cast", "plot")]
    for name, records in (
        ("reviews.jsonl", rows),
        ("answers.jsonl", answers),
        ("answers-held-out.jsonl", answers),
    ):
        (tmp_path / name).write_text("\n".join(str(record).replace("'", '"') for record in records))
    overrides = [f"model.path={tiny_model_folder}", "train.steps=2"]
    chosen = config.load(path, [*overrides, "data.max_length=64"])
    summary = zotune.start(chosen, zotune.SilentReporter())
    assert summary.steps == 2
    assert summary.last.examples == {"sentiment": 500, "completions": 3}[path.stem]
