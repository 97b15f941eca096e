"""What is exported is what the live model is, whoever loads it."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_runs
import pytest
import torch
from made_runs import MadeRun, load, scores
from peft import PeftModel
from safetensors.torch import load_file

from zotune import checkpoint
from zotune.errors import ConfigError
from zotune.export import apply_journal, drafts, export_run, journal_file
from zotune.export.adapter import Adapter, Places, _targets, write
from zotune.export.recipe import Recipe
from zotune.journal import records
from zotune.layout import Site
from zotune.run import RunDirectory
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.sites import find_sites
from zotune.testing import tiny

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT warns that a tied head goes along whole, which is on purpose.
    pytest.mark.filterwarnings("ignore"),
]

# Three windows, the last of them open at the end of the run.
WINDOWS = {"lr": 1e-3, "interval": 3}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lozo, linear, llama": ("llama", "lozo", {"scope": "linear", **WINDOWS}),
    "lozo, linear, gpt2": ("gpt2", "lozo", {"scope": "linear", **WINDOWS}),
    "lozo, all, tied head": ("llama-tied", "lozo", WINDOWS),
    "lozo, all, biases and learnt positions": ("opt", "lozo", WINDOWS),
    "lozo, all, transposed weights": ("gpt2", "lozo", WINDOWS),
    "lozo, all, some biases": ("qwen2", "lozo", WINDOWS),
    "lozo, all, norms of heads": ("qwen3", "lozo", WINDOWS),
    "lozo, all, scaled embedding": ("gemma3", "lozo", WINDOWS),
    "lozo-m, two directions": ("llama", "lozo-m", {"scope": "linear", "directions": 2, **WINDOWS}),
    "mezo-factorized": ("llama-tied", "mezo-factorized", {"scope": "linear", "lr": 1e-3, "rank": 3}),
    "lozo-late": ("llama-tied", "lozo-late", {"lr": 1e-2, "interval": 3}),
    "lozo-late, transposed weights": ("gpt2", "lozo-late", {"lr": 1e-2, "interval": 3}),
    "mezo-lora": ("opt", "mezo-lora", {"lr": 1e-2}),
    "mezo-lora, transposed weights": ("gpt2", "mezo-lora", {"lr": 1e-2}),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make(folder: Path, case: tuple[str, str, dict[str, Any]], **options: Any) -> MadeRun:
    family, preset, method = case
    return made_runs.make(folder, family, preset, **method, **options)


@cases
def test_every_format_gives_the_logits_of_the_live_model(tmp_path: Path, case: Any) -> None:
    run = make(tmp_path, case)
    live = run.scores()
    assert (scores(load(run.base)) - live).abs().max() > 1e-2  # or the rest would prove nothing
    export_run(run.path, tmp_path / "merged")
    torch.testing.assert_close(scores(load(tmp_path / "merged")), live, atol=2e-5, rtol=0)

    exported = export_run(run.path, tmp_path / "adapter", "peft")
    assert exported.error == 0
    adapted = PeftModel.from_pretrained(load(run.base), tmp_path / "adapter")
    torch.testing.assert_close(scores(adapted), live, atol=2e-5, rtol=0)
    torch.testing.assert_close(scores(adapted.merge_and_unload()), live, atol=2e-5, rtol=0)

    export_run(run.path, tmp_path / "run.zotune", "journal")
    apply_journal(str(run.base), tmp_path / "run.zotune", tmp_path / "applied")
    assert_same_weights(tmp_path / "applied", tmp_path / "merged")


@pytest.mark.parametrize("fold", ["stochastic", "master"])
@pytest.mark.parametrize("preset", ["lozo", "mezo", "mezo-lora"])
def test_in_16_bits_apply_gives_the_bits_of_the_merged_export(tmp_path: Path, preset: str, fold: str) -> None:
    run = made_runs.make(tmp_path, "llama-tied", preset, dtype="bfloat16", fold=fold, lr=1e-3)
    export_run(run.path, tmp_path / "merged")
    export_run(run.path, tmp_path / "run.zotune", "journal")
    apply_journal(str(run.base), tmp_path / "run.zotune", tmp_path / "applied")
    assert_same_weights(tmp_path / "applied", tmp_path / "merged")


def test_in_16_bits_an_adapter_is_as_near_as_rounding_allows(tmp_path: Path) -> None:
    run = made_runs.make(tmp_path, "llama", "lozo", dtype="bfloat16", scope="linear", **WINDOWS)
    export_run(run.path, tmp_path / "adapter", "peft")
    moved = (scores(load(run.base)) - run.scores()).abs().max()
    adapted = PeftModel.from_pretrained(load(run.base), tmp_path / "adapter")
    assert (scores(adapted) - run.scores()).abs().max() < 0.25 * moved


@pytest.mark.parametrize("fold", ["stochastic", "master"])
def test_tuned_lora_matrices_are_the_adapter_bit_for_bit(tmp_path: Path, fold: str) -> None:
    run = made_runs.make(tmp_path, "llama", "mezo-lora", dtype="bfloat16", fold=fold, lr=1e-2)
    export_run(run.path, tmp_path / "adapter", "peft")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    live = {name.removeprefix("weight/"): each for name, each in run.live.state().items() if name.startswith("weight/")}
    assert len(stored) == len(live)
    for name, tensor in live.items():
        assert torch.equal(stored["base_model.model." + name.replace(".default", "")], tensor)


def test_after_a_fold_the_merged_weights_are_the_live_ones(tmp_path: Path) -> None:
    run = made_runs.make(tmp_path, "llama-tied", "lozo", dtype="bfloat16", steps=6, **WINDOWS)
    export_run(run.path, tmp_path / "merged")
    merged = dict(load(tmp_path / "merged").named_parameters())
    live = {name.removeprefix("weight/"): each for name, each in run.live.state().items() if name.startswith("weight/")}
    assert all(torch.equal(merged[name], weight) for name, weight in live.items())


def test_a_checkpoint_saves_replaying_and_changes_nothing(tmp_path: Path) -> None:
    run = made_runs.make(tmp_path, "llama-tied", "lozo", dtype="bfloat16", **WINDOWS)
    export_run(run.path, tmp_path / "replayed")
    checkpoint.save(RunDirectory(run.path).checkpoints, run.live.state(), step=made_runs.STEPS, window=2, keep=1)
    export_run(run.path, tmp_path / "restored")
    assert_same_weights(tmp_path / "replayed", tmp_path / "restored")


def test_checkpoints_of_another_run_and_of_lost_steps_are_not_exported(tmp_path: Path) -> None:
    run = made_runs.make(tmp_path, "llama-tied", "lozo", dtype="bfloat16", **WINDOWS)
    export_run(run.path, tmp_path / "replayed")
    other, folder = EmbeddedRuntime(load(run.base), run.live.method, seed=3).state(), RunDirectory(run.path).checkpoints
    checkpoint.save(folder, other, step=made_runs.STEPS, window=2, keep=2, journal="of another run")
    checkpoint.save(folder, other, step=made_runs.STEPS + 1, window=2, keep=2)
    export_run(run.path, tmp_path / "restored")
    assert_same_weights(tmp_path / "replayed", tmp_path / "restored")


def test_auto_finds_the_dtype_that_the_run_had(tmp_path: Path) -> None:
    run = made_runs.make(tmp_path, "llama-tied", "lozo", dtype="bfloat16", **WINDOWS)
    settings = RunDirectory(run.path).config
    settings.write_text(settings.read_text().replace('dtype = "bfloat16"', 'dtype = "auto"'))
    export_run(run.path, tmp_path / "merged")
    assert load(tmp_path / "merged").dtype == torch.bfloat16
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "bfloat16" in card
    assert "PeftModel" not in card


def test_the_rank_for_vllm_is_one_that_it_has_where_the_matrices_are_kept_as_they_are(tmp_path: Path) -> None:
    run = made_runs.make(tmp_path, "llama", "mezo-lora", lr=1e-2, lora_rank=5)
    exported = export_run(run.path, tmp_path / "adapter", "peft")
    assert exported.rank == 5
    assert "--max-lora-rank 8." in exported.notes[1]


@pytest.mark.parametrize(
    ("rank", "stored", "served", "expected"),
    [
        (8, 8, True, "loads it with --max-lora-rank 8."),
        (6, 8, True, "loads it with --max-lora-rank 8. It is padded with zeros to rank 8."),
        (5, 5, True, "loads it with --max-lora-rank 8."),
        (600, 600, True, "because its rank is above 512; the format merged is the way there."),
        (
            600,
            600,
            False,
            "because it tunes more than the weights of linear layers; the format merged is the way there.",
        ),
    ],
)
def test_an_adapter_says_whether_vllm_loads_it(rank: int, stored: int, served: bool, expected: str) -> None:
    assert Adapter(rank, stored, 0.0, None, served).notes[1].endswith(expected)


@pytest.mark.parametrize("part", ["embeddings", "biases", "saved"])
def test_vllm_is_told_to_load_weights_of_linear_layers_alone(part: str) -> None:
    places = Places((Site("w", (2, 2)),), (), (), ())
    assert places.served
    assert not replace(places, **{part: ("something",)}).served


def test_an_adapter_of_linear_layers_is_what_vllm_reads(tmp_path: Path) -> None:
    run = made_runs.make(tmp_path, "llama", "lozo", scope="linear", **WINDOWS)
    exported = export_run(run.path, tmp_path / "adapter", "peft")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    # Three windows of rank 2, and zeros up to the next rank that vLLM has kernels for.
    assert (exported.rank, config["r"], config["lora_alpha"]) == (8, 8, 8)
    assert "rank 6" in exported.notes[0]
    assert "--max-lora-rank 8" in exported.notes[1]
    assert (config["modules_to_save"], config["bias"], config["use_rslora"]) == (None, "none", False)
    assert config["inference_mode"]
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert all(text in card for text in ("PeftModel", *exported.notes))
    assert (tmp_path / "adapter" / "tokenizer.json").exists()
    assert set(config["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    assert all(8 in tensor.shape for tensor in tensors.values())


def test_an_adapter_of_everything_says_what_vllm_does_not_load(tmp_path: Path) -> None:
    run = made_runs.make(tmp_path, "llama-tied", "lozo", **WINDOWS)
    exported = export_run(run.path, tmp_path / "adapter", "peft")
    assert exported.rank == 6
    assert "vLLM's LoRA loader does not take it" in exported.notes[1]
    assert "merged" in exported.notes[1]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors if "embed_tokens" in name} == {
        "lora_embedding_A",
        "lora_embedding_B",
    }


@pytest.mark.parametrize(("family", "bias"), [("opt", "lora_only"), ("llama-tied", "none")])
def test_peft_is_told_of_biases_where_some_are_tuned(tmp_path: Path, family: str, bias: str) -> None:
    run = made_runs.make(tmp_path, family, "lozo", **WINDOWS)
    export_run(run.path, tmp_path / "adapter", "peft")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["bias"] == bias


@pytest.mark.parametrize(
    ("family", "modules", "named", "transposed"),
    [
        ("llama", ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"], ["up_proj"], False),
        ("llama", ["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"], False),
        ("gpt2", [f"transformer.h.{layer}.attn.c_attn" for layer in (0, 1)], ["c_attn"], True),
    ],
)
def test_peft_is_told_of_modules_that_are_tuned_by_names_that_mean_no_other(
    family: str, modules: list[str], named: list[str], transposed: bool
) -> None:
    found = _targets(tiny.model(family), [f"{module}.lora_A.weight" for module in modules])
    assert found == {"target_modules": named, "fan_in_fan_out": transposed}


@pytest.mark.parametrize(
    ("family", "scope", "whole"),
    [("llama-tied", "all", True), ("llama-tied", "linear", False), ("llama", "all", False)],
)
def test_a_head_goes_along_whole_where_it_is_a_tuned_embedding(family: str, scope: str, whole: bool) -> None:
    model = tiny.model(family)
    assert ("lm_head" in Places.of(model, find_sites(model, scope)).saved) is whole


def test_an_adapter_names_its_base_model_and_the_revision(tmp_path: Path) -> None:
    run = made_runs.make(tmp_path, "llama", "lozo", scope="linear", **WINDOWS)
    recipe = Recipe.of_run(run.path)
    recipe = replace(recipe, model=recipe.model.model_copy(update={"revision": "v1"}))
    (tmp_path / "adapter").mkdir()
    write(recipe, tmp_path / "adapter", rank=None, max_error=0.01)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(run.base), "v1")


def test_a_smaller_rank_costs_the_error_that_is_told(tmp_path: Path) -> None:
    run = made_runs.make(tmp_path, "llama", "lozo", scope="linear", **WINDOWS)
    with pytest.raises(ConfigError, match=r"rank 3 leaves out .*% of the change .* rank 6 would do") as refused:
        export_run(run.path, tmp_path / "adapter", "peft", rank=3)
    assert "--format merged" in str(refused.value)
    exported = export_run(run.path, tmp_path / "adapter", "peft", rank=3, max_error=0.9)
    whole = export_run(run.path, tmp_path / "whole", "peft")
    lost, change = total(tmp_path / "whole", tmp_path / "adapter"), total(tmp_path / "whole")
    assert whole.error == 0
    assert exported.error == pytest.approx(lost / change, rel=1e-4)
    assert f"{exported.error:.2e} overall" in exported.notes[0]


def total(a: Path, b: Path | None = None) -> float:
    """Frobenius norm of the difference between two adapters, or of one."""

    def changes(folder: Path) -> dict[str, torch.Tensor]:
        tensors = load_file(folder / "adapter_model.safetensors")
        stems = {name.partition(".lora_")[0] for name in tensors}
        return {stem: tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"] for stem in stems}

    first = changes(a)
    second = changes(b) if b else {stem: torch.zeros_like(change) for stem, change in first.items()}
    return float(torch.cat([(first[stem] - second[stem]).flatten() for stem in first]).norm())


@pytest.mark.parametrize("method", [{"preset": "mezo"}, {"preset": "lozo", "weight_decay": 1.0, **WINDOWS}])
def test_a_change_of_full_rank_is_refused_with_the_reason(tmp_path: Path, method: dict[str, Any]) -> None:
    run = made_runs.make(tmp_path, "llama", scope="linear", **({"lr": 1e-3} | method))
    with pytest.raises(ConfigError, match=r"weight decay, changes every weight .*--format merged"):
        export_run(run.path, tmp_path / "adapter", "peft", rank=8)
    exact = export_run(run.path, tmp_path / "adapter", "peft")
    assert exact.error == 0
    adapted = PeftModel.from_pretrained(load(run.base), tmp_path / "adapter")
    torch.testing.assert_close(scores(adapted), run.scores(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("format", ["merged", "peft"])
def test_who_loads_a_model_as_its_card_says_has_the_soft_cap_of_its_attention(tmp_path: Path, format: str) -> None:
    run = made_runs.make(tmp_path, "gemma2", "lozo", scope="linear", **WINDOWS)
    export_run(run.path, tmp_path / "out", format)
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("PATH", str(tmp_path / "out")).replace("BASE", str(run.base)), names)
    torch.testing.assert_close(scores(names["model"]), run.scores(), atol=2e-5, rtol=0)
    assert "soft cap" in card


def test_weights_are_cut_into_shards(tmp_path: Path) -> None:
    run = made_runs.make(tmp_path, "llama", "lozo", scope="linear", **WINDOWS)
    export_run(run.path, tmp_path / "merged", shard_size="40KB")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(scores(load(tmp_path / "merged")), run.scores(), atol=2e-5, rtol=0)


def test_a_journal_file_is_small_and_always_the_same(tmp_path: Path) -> None:
    run = made_runs.make(tmp_path, "llama", "lozo", **WINDOWS)
    first = export_run(run.path, tmp_path / "a", "journal")
    export_run(run.path, tmp_path / "b", "journal")
    assert first.bytes == (tmp_path / "a").stat().st_size < 2000
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes()[4:8] == bytes(4), "gzip keeps the time there"


def test_a_journal_file_has_the_steps_that_it_tells_of_though_the_run_goes_on(tmp_path: Path) -> None:
    run = made_runs.make(tmp_path, "llama", "lozo", **WINDOWS)
    journal = RunDirectory(run.path).journal
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], records.line(records.Change(2, {"method.eps": 0.5})), *lines[3:]]))
    recipe = Recipe.of_run(run.path)
    known = recipe.journal.path.read_bytes()
    recipe.journal.path.write_bytes(known + known.splitlines(keepends=True)[-1] + b'{"step": 8, "loss')
    journal_file.write(recipe, tmp_path / "run.zotune")
    assert gzip.decompress((tmp_path / "run.zotune").read_bytes()).partition(b"\n")[2] == known


def test_a_size_is_that_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "chat").write_bytes(b"12345")
    (tmp_path / "model").write_bytes(b"123")
    assert (drafts.size(tmp_path / "model"), drafts.size(tmp_path)) == (3, 8)


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
