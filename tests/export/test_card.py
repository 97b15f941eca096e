"""Model cards say what the run has on record, and nothing of the machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import made_runs
import pytest
from huggingface_hub import metadata_load

from zotune.export import apply_journal, export_run
from zotune.export.card import Facts, render
from zotune.export.recipe import Recipe
from zotune.run import RunDirectory

pytestmark = pytest.mark.usefixtures("one_thread")


def facts(folder: Path) -> Facts:
    """Of a run with three evaluations and one of a step that is lost, on a base model whose card has a license."""
    made = made_runs.make(folder, "llama", "lozo", scope="linear", lr=1e-3)
    (made.base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    run = RunDirectory(made.path)
    for step, loss, accuracy in ((0, 1.5, 0.5), (3, 1.2, 0.6), (7, 1.0, 0.75), (9, 0.5, 1.0)):
        record = {"kind": "eval", "step": step, "loss": loss, "accuracy": accuracy, "examples": 24}
        run.add_metrics({**record, "seconds": 0.5})
    manifest = json.loads((run.path / "manifest.json").read_text())
    manifest["command"] = ["/opt/bin/zotune", "run", "my config.toml", "/home/someone/x"]
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    return Recipe.of_run(made.path).facts


def test_a_card_has_data_method_steps_metrics_and_command(tmp_path: Path) -> None:
    text = render(facts(tmp_path), "merged", dtype="float32")
    for expected in (
        "| data | train rows.jsonl |",
        "Enhancing Zeroth-order Fine-tuning",
        "lr = 0.001",
        "rank = 2",
        "| steps | 7, 1 of them without an estimate, batches of 4, seed 3 |",
        "| after 0 steps | loss 1.5000, accuracy 50.0 % on 24 validation rows |",
        "| after 7 steps | loss 1.0000, accuracy 75.0 % on 24 validation rows |",
        "| trained by | `zotune run 'my config.toml' x` |",
        "zotune 0.",
        "AutoModelForCausalLM.from_pretrained",
    ):
        assert expected in text
    assert text.count("| after ") == 2
    assert str(tmp_path) not in text
    assert "lora" not in text


def test_a_command_is_one_cell_without_paths_of_the_machine(tmp_path: Path) -> None:
    run = RunDirectory(made_runs.make(tmp_path, "llama", "lozo", scope="linear").path)
    manifest = json.loads(run.manifest.read_text())
    for words, shown in (
        (["zotune", "model.path=/home/someone/tiny", "output=runs/x"], "zotune model.path=tiny output=runs/x"),
        (["zotune", 'output = "/home/someone/a=b"', "--out=/home/someone/c"], "zotune 'output =a=b' --out=c"),
        (["/opt/bin/zotune", "/home/some=one/x", "train.steps=9"], "zotune x train.steps=9"),
        (["mine.py", "data.prompt=<|user|>\n{text}"], "mine.py 'data.prompt=<\\|user\\|> {text}'"),
        (["/opt/lib/zotune/__main__.py", "run", "x.toml"], "python -m zotune run x.toml"),
    ):
        run.manifest.write_text(json.dumps(manifest | {"command": words}))
        text = render(Recipe.of_run(run.path).facts, "merged", dtype="float32")
        assert f"\n| trained by | `{shown}` |\n" in text


def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    found = facts(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(render(found, "merged", dtype="float32"))
    local = metadata_load(path)
    assert local is not None
    assert (local["library_name"], local["license"]) == ("transformers", "apache-2.0")
    assert "lozo" in local["tags"]
    assert "base_model" not in local
    path.write_text(render(replace(found, base="some/model", hub=True, license=None), "peft", dtype="bfloat16"))
    hub = metadata_load(path)
    assert hub is not None
    assert (hub["base_model"], hub["library_name"]) == ("some/model", "peft")
    assert "license" not in hub


@pytest.mark.parametrize(("revision", "pinned"), [(None, ""), ("v1", ', revision="v1"')])
def test_an_adapter_is_shown_on_the_base_model_that_it_was_tuned_on(
    tmp_path: Path, revision: str | None, pinned: str
) -> None:
    found = replace(facts(tmp_path), base="some/model", hub=True, revision=revision)
    text = render(found, "peft", dtype="bfloat16")
    assert f'AutoModelForCausalLM.from_pretrained("some/model", dtype="bfloat16"{pinned})\n' in text


def test_apply_writes_the_card_of_the_run(tmp_path: Path) -> None:
    facts(tmp_path)
    export_run(tmp_path / "run", tmp_path / "merged")
    export_run(tmp_path / "run", tmp_path / "run.zotune", "journal")
    apply_journal(str(tmp_path / "base"), tmp_path / "run.zotune", tmp_path / "applied")
    assert (tmp_path / "applied" / "README.md").read_text() == (tmp_path / "merged" / "README.md").read_text()
