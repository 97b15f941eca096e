import json
import mmap
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from zotune import bench, cli, peak
from zotune.bench import memory, work
from zotune.errors import ConfigError, DataError, ZotuneError
from zotune.rows import Candidate, Example, Row
from zotune.testing import tiny

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "It", "was", "terrible", "great", *(f"w{index}" for index in range(60))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.model("llama-tied").save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    for split, count in (("train", 40), ("validation", 10)):
        rows = [
            {"sentence": " ".join(draw.choices(WORDS[8:], k=draw.randint(2, 20))), "label": index % 2, "idx": index}
            for index in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_report_from_a_tiny_model(model: str, data: Path) -> None:
    threads = torch.get_num_threads()
    report = bench.step(model=model, data=data, dtype="float32", batch_size=4, repeats=2, threads=1)
    assert torch.get_num_threads() == threads
    line = json.loads(json.dumps(report.to_json()))
    assert line["ratio"] == pytest.approx(line["baseline_step_s"] / line["step_s"])
    assert 0 < line["forward_share"] < 1
    assert line["peak_share"] == pytest.approx(line["flops"] / line["step_s"] / line["peak_flops_per_s"])
    assert line["baseline_tokens"] % 64 == 0
    assert line["tokens"] < line["baseline_tokens"] / 2
    assert set(line["phases"]) >= {"draw", "pack", "forward", "apply", "fold", "other"}
    assert all(seconds >= 0 for seconds in line["phases"].values())
    assert set(line["versions"]) == {"python", "torch", "zotune", "transformers", "safetensors", "tokenizers", "numpy"}
    console = Console(record=True, width=120)
    report.render(console)
    text = console.export_text()
    assert f"{report.ratio:.2f}" in text
    assert "forward" in text


def test_more_directions_are_compared_with_as_many_official_steps(model: str, data: Path) -> None:
    one, three = (
        bench.step(model=model, data=data, dtype="float32", batch_size=4, repeats=1, directions=count, threads=1)
        for count in (1, 3)
    )
    assert three.tokens == 3 * one.tokens
    assert three.baseline_tokens == 3 * one.baseline_tokens


def test_a_kept_comparison_is_not_measured_again_and_stands_in_the_report(
    model: str, data: Path, tmp_path: Path
) -> None:
    words = ["bench", "step", "--model", model, "--data", str(data), "--dtype", "float32", "--batch-size", "2"]
    words += ["--repeats", "1", "--threads", "1", "--out", str(tmp_path)]
    first = CliRunner().invoke(cli.app, [*words, "--json"])
    assert first.exit_code == 0, first.output
    second = CliRunner().invoke(cli.app, words)
    assert "measured already" in second.output
    shown = CliRunner().invoke(cli.app, ["bench", "report", str(tmp_path)]).output
    line = json.loads(first.stdout)
    assert f"| {line['step_s']:.3f} | {line['baseline_step_s']:.3f} | {line['ratio']:.2f} |" in shown


@pytest.mark.slow
def test_memory_counts_what_each_process_needs(model: str, data: Path) -> None:
    settings = {"model": model, "data": data, "dtype": "float32", "batch_size": 4, "threads": 1}
    found = memory.measure({**settings, "scope": "all", "rank": 2, "directions": 1})
    assert found.adamw_lora is not None
    assert min(found.zotune, found.inference, found.adamw, found.adamw_lora) > 50e6
    assert found.ratio == found.zotune / found.inference


def test_a_failing_measurement_says_why(data: Path) -> None:
    settings = {"model": "./nowhere", "data": data, "dtype": "float32", "batch_size": 4, "threads": 1}
    with pytest.raises(ZotuneError, match="nowhere"):
        memory.measure({**settings, "scope": "all", "rank": 2, "directions": 1})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux lets a process forget its peak")
def test_the_peak_starts_anew() -> None:
    device = torch.device("cpu")
    # What ran before in this process may have peaked higher than all that follows.
    peak.forget_peak(device)
    before = peak.peak_bytes(device)
    # Not of the heap, which may keep what is freed.
    big = mmap.mmap(-1, 200_000_000)
    torch.frombuffer(big, dtype=torch.uint8).fill_(1)
    assert peak.peak_bytes(device) > before + 100e6
    big.close()
    peak.forget_peak(device)
    assert peak.peak_bytes(device) < before + 100e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float23"}, "float32"),
        ({"baseline_dtype": "int8"}, "unknown dtype"),
        ({"scope": "everything"}, "unknown scope"),
        ({"repeats": 0}, "at least 1"),
    ],
)
def test_refuses_what_it_cannot_do(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.step(**change)


def test_refuses_a_folder_without_rows(model: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl"):
        bench.step(model=model, data=tmp_path, dtype="float32")


def test_flops_by_hand() -> None:
    made = tiny.model("llama")
    single = Row(tuple(range(10)), (Candidate((4,), (0,)), Candidate((5,), (0,))))
    layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48
    attention = 2 * 2 * 32 * 55
    expected = 2 * (2 * layer * 10 + attention + 32 * 2)
    assert work.step_flops(made, [single], 1, normalised=False) == expected
    assert work.step_flops(made, [single], 3, normalised=True) == 3 * (expected + 2 * 32 * 94)
    # Three branch tokens are computed behind ten prompt tokens; their own last one is not.
    branch = replace(single, candidates=(Candidate((4, 5, 6, 7), (0, 3)), Candidate((5,), (0,))))
    attention = 2 * 2 * 32 * (55 + 3 * 10 + 6)
    assert work.step_flops(made, [branch], 1, normalised=True) == 2 * (2 * layer * 13 + attention + 2 * 32 * 96)


def test_padded_tokens() -> None:
    rows = [Row(tuple(range(length)), (Candidate((4,), (0,)), Candidate((5, 6), (0, 1)))) for length in (3, 7)]
    assert work.padded_tokens([Example(row) for row in rows]) == 2 * 4 * 16


def test_the_peak_is_a_rate() -> None:
    assert 1e8 < work.matmul_peak(torch.float32, torch.device("cpu")) < 1e15


CHECKOUT = Path(__file__).parent.parent


def pairs(*words: str) -> subprocess.CompletedProcess[str]:
    script = str(CHECKOUT / "benchmarks" / "pairs.py")
    return subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("old", ["official", str(CHECKOUT)])
def test_two_sides_in_turn(model: str, data: Path, old: str) -> None:
    words = ["--model", model, "--data", str(data), "--dtype", "float32", "--batch-size", "2", "--threads", "1"]
    done = pairs(old, str(CHECKOUT), *words, "--pairs", "3")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    low, high = found["quartiles"]
    assert found["pairs"] == 3
    assert 0 < low <= found["ratio"] <= high
    assert min(found["old_s"], found["new_s"]) > 0


@pytest.mark.parametrize("sides", [("official", "official"), ("official", "nowhere"), ("nowhere", str(CHECKOUT))])
def test_a_side_that_is_no_checkout_is_named(sides: tuple[str, str]) -> None:
    done = pairs(*sides)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: got {sides[0]} and {sides[1]}; give a checkout of zotune")
