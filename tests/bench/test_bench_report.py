from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import made_results
import pytest
from typer.testing import CliRunner

from zotune import cli
from zotune.bench import report
from zotune.bench.report import section
from zotune.bench.results import Result


def text(*results: Result) -> str:
    return report.markdown(report.sections(results), pictures=False)


def kept(folder: Path, *results: Result) -> Path:
    folder.mkdir(parents=True)
    for number, result in enumerate(results):
        (folder / f"{number}.json").write_text(json.dumps(vars(result)))
    return folder


def test_steps_are_compared_with_the_official_ones_of_the_same_card_only() -> None:
    shown = text(
        made_results.scaling("official", 1.0),
        made_results.scaling("torch", 0.1),
        made_results.scaling("vllm", 0.05, gpu="H200"),
    )
    assert "| opt-1.3b | all | 2 | 1 | 16 | 1000.0 | 100.0 (10.00x, 10%) |" in shown
    assert "| opt-1.3b | all | 2 | 1 | 16 | 50.0 (20%) |" in shown


def test_more_directions_are_compared_with_as_many_official_steps() -> None:
    shown = text(made_results.scaling("official", 1.0), made_results.scaling("torch", 0.5, directions=4))
    assert "| 1000.0 | 500.0 (8.00x, 2%) |" in shown
    assert shown.count("| opt-1.3b | all") == 1, (
        "an official step that something is compared with has no line of its own"
    )


def test_an_official_step_that_nothing_is_compared_with_has_a_line() -> None:
    assert "| opt-1.3b |  |  |  | 16 | 1000.0 |" in text(made_results.scaling("official", 1.0))


def test_the_line_through_batches_and_directions_and_its_share_at_batch_16() -> None:
    # 46 tokens per example and direction: 10 ms, and 25 microseconds per token.
    sizes = ((4, 1), (32, 1), (32, 4))
    steps = [
        made_results.scaling("torch", 0.01 + 25e-6 * 46 * batch * count, batch=batch, directions=count)
        for batch, count in sizes
    ]
    share = 0.01 / (0.01 + 25e-6 * 46 * 16)
    assert f"| opt-1.3b | torch | all | 2 | 3 | 25 | 10 | {share:.1%} | 0.0% |" in text(*steps)
    assert "per token" not in text(steps[0]), "one point has no line"


def test_the_line_through_the_sizes_of_a_family() -> None:
    sizes = {"opt-1.3b": 1.3, "opt-2.7b": 2.7, "opt-13b": 13.0}
    steps = [made_results.scaling("torch", 0.002 + 0.003 * size, model=name) for name, size in sizes.items()]
    shown = text(*steps, made_results.scaling("torch", 5.0, model="qwen3-4b"))
    assert "| opt | torch | all | 2 | 1 | 16 | 3 | 3 | 2 | 0.0% |" in shown
    assert "| qwen3 |" not in shown


def test_the_share_of_a_step_that_is_neither_forward_nor_head() -> None:
    shown = text(made_results.overhead("torch", 0.0012, forward=0.06, head=0.02, draw=0.015, journal=0.005))
    assert "| 100 | 15 | 0 | 60 | 20 |" in shown
    assert "| 20.0% | 1.2 |" in shown
    assert "| 0.0% |  |" in text(made_results.overhead("torch", None, forward=0.1)), "a processor launches nothing"


def test_what_failed_is_listed_with_its_reason() -> None:
    failed = replace(made_results.scaling("vllm", 1.0, model="opt-13b"), figures={"error": "out of memory"})
    shown = text(made_results.scaling("torch", 0.1), failed)
    assert "- opt-13b vllm bfloat16 8 16 all 2 1: out of memory" in shown
    assert "out of memory" in text(failed), "also where nothing else is"


def test_every_machine_and_command_is_named_once() -> None:
    one, two = made_results.scaling("torch", 0.1), made_results.scaling("vllm", 0.2)
    later = replace(two, machine={**two.machine, "date": "2026-11-27T10:00:00+00:00"})
    expected = "- H100; torch 2.13; commit abc1234; 2026-11-25 to 2026-11-27; `zotune bench scaling`"
    assert section.Section.on([one, later], "Steps").markdown.splitlines()[-1] == expected


def test_results_of_an_unknown_kind_are_listed() -> None:
    shown = text(Result("cluster", {"replicas": 4}, {"step_s": 0.25, "each": [1, 2]}, made_results.MACHINE))
    assert "## Cluster" in shown
    assert "| 4 | 0.25 |" in shown


def test_the_command_prints_and_writes_tables_and_pictures(tmp_path: Path) -> None:
    results = [
        made_results.scaling(runtime, slowness * size * batch, model=f"opt-{size}b", batch=batch)
        for runtime, slowness in (("official", 1.0), ("torch", 0.1))
        for size in (1.3, 13)
        for batch in (16, 64)
    ]
    folder = kept(tmp_path / "results", *results, made_results.overhead("torch", None, forward=0.06, draw=0.02))
    done = CliRunner().invoke(cli.app, ["bench", "report", str(folder), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "report.md").read_text() in done.output
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"scaling-1.png", "overhead.png"}
    assert all(f"]({name})" in done.output for name in pictures)
    assert not list(folder.glob("*.png"))
    line = CliRunner().invoke(cli.app, ["bench", "report", str(folder), "--json"]).stdout
    assert Path(json.loads(line)["report"]).read_text() in done.output


def test_a_folder_without_results_is_a_users_mistake(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["bench", "report", str(tmp_path)])
    assert done.exit_code == 2
    assert "has no results" in done.output


@pytest.mark.parametrize("kind", report.RENDERERS)
def test_every_renderer_copes_with_failures_alone(kind: str) -> None:
    failed = Result(kind, {"model": "opt-13b"}, {"error": "out of memory"}, made_results.MACHINE)
    assert "out of memory" in text(failed)
