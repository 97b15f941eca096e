"""Starting an engine, and every way in which that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from engines import HEAD_SIZE
from tiny_checkpoint import write
from transformers import CTRLConfig, Gemma3TextConfig, LlamaConfig

from zotune.config import ModelConfig, RuntimeConfig
from zotune.errors import ModelError
from zotune.layout import Layout, Site
from zotune.optimizer import Method
from zotune.runtimes.engine import launch, memory, worker_settings
from zotune.testing import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return write(tiny.model("llama", head_size=HEAD_SIZE), tmp_path_factory.mktemp("checkpoint"))


def settings(sites: tuple[Site, ...]) -> dict[str, Any]:
    layout = Layout(sites)
    return worker_settings.pack(Method(rank=2, interval=3), layout, 0, RuntimeConfig(type="vllm"))


SITES = (Site("model.norm.weight", (32,)), Site("model.layers.0.mlp.down_proj.weight", (32, 48)))


def begin(model: ModelConfig, sites: tuple[Site, ...] = SITES, **options: Any) -> Any:
    chosen = {"dtype": "float32", "max_tokens": 256, "max_rows": 8, "longest": tiny.CONTEXT, **options}
    return launch.start(model, settings(sites), **chosen)


def descendants() -> list[int]:
    """Processes that still run below this one."""
    return sorted(each.pid for each in launch._descendants())


def test_a_worker_gets_the_sites_of_the_run() -> None:
    second = replace(SITES[1], name="model.layers.1.mlp.down_proj.weight", decays=False, turn=(1, 2))
    plain = json.loads(json.dumps(settings((*SITES, second))))
    assert tuple(map(worker_settings.site, plain["sites"])) == (*SITES, second)
    assert memory.factor_bytes(plain, 4, shards=1, host=False) > 0


def test_a_started_engine_leaves_the_process_as_it_was(
    checkpoint: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vLLM names each engine of a process here, and an earlier test may have started one.
    monkeypatch.delenv("VLLM_DIST_IDENT", raising=False)
    environment, set_threads = dict(os.environ), torch.set_num_threads
    llm = begin(checkpoint)
    try:
        kept = {name: value for name, value in os.environ.items() if name in environment or name == "LD_PRELOAD"}
        assert kept == environment
        answers = llm.generate([{"prompt_token_ids": [5, 6, 7]}], use_tqdm=False)
        assert len(answers[0].outputs[0].token_ids) > 0
        cache = llm.llm_engine.vllm_config.cache_config
        assert cache.block_size == 32
        assert cache.num_gpu_blocks - 1 >= 8 + 256 // 32
    finally:
        launch.stop(llm)
    assert torch.set_num_threads is set_threads


def test_too_little_memory_is_refused_with_both_numbers(checkpoint: ModelConfig) -> None:
    with pytest.raises(
        ModelError, match=r"needs about 1,152,921,\d{3},.* bytes on this machine .*, and [\d,]+ are available"
    ):
        begin(checkpoint, weight_bytes=1 << 60, kv_bytes=1 << 20)


def test_a_context_longer_than_the_model_s_is_refused_with_its_reason(checkpoint: ModelConfig) -> None:
    with pytest.raises(ModelError, match=r"cannot load the model .*max_model_len \(4096\)") as caught:
        begin(checkpoint, longest=4096)
    assert "\n" not in str(caught.value)
    assert "For further information" not in str(caught.value)


def test_a_gpu_that_others_use_is_no_fault_of_the_model_s(
    checkpoint: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise ValueError(
            "Free memory on device cuda:0 (60.0/80.0 GiB) on startup is less than desired GPU memory utilization (0.9, "
            "72.0 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
        )

    monkeypatch.setattr("vllm.LLM", refuse)
    with pytest.raises(ModelError, match=r"60\.0/80\.0.* Lower runtime\.vllm\.memory_fraction"):
        begin(checkpoint)


def test_an_architecture_that_vllm_does_not_have_is_named(checkpoint: ModelConfig, tmp_path: Path) -> None:
    for each in Path(checkpoint.path).glob("token*"):
        (tmp_path / each.name).symlink_to(each)
    CTRLConfig(architectures=["CTRLLMHeadModel"], n_embd=64, n_head=2, n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="CTRLLMHeadModel") as caught:
        begin(ModelConfig(path=str(tmp_path)))
    assert len(str(caught.value)) < 700


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        begin(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("own_process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_worker_that_cannot_start_says_why_and_leaves_no_process(
    checkpoint: ModelConfig, own_process: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    before = descendants()
    with pytest.raises(ModelError, match=r"model\.nowhere\.weight"):
        begin(checkpoint, (Site("model.nowhere.weight", (8, 8)),), own_process=own_process)
    assert descendants() == before
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("own_process", "workers"), [(True, 1), (False, 2), (True, 2)])
def test_processes_share_the_threads_and_end_with_the_engine(
    checkpoint: ModelConfig, own_process: bool, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    before = descendants()
    llm = begin(checkpoint, own_process=own_process, tensor_parallel=workers, threads=2)
    try:
        assert llm.collective_rpc(_threads) == [2 // workers] * workers
    finally:
        launch.stop(llm)
    assert descendants() == before


def _threads(worker: Any) -> int:
    return torch.get_num_threads()


def test_blocks_are_held_for_groups_of_layers_of_one_size() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    hybrid = Gemma3TextConfig(num_hidden_layers=26, layer_types=(kinds * 5)[:26])
    assert memory.padded_layers(hybrid) == 4 + 6 * 4
    uniform = LlamaConfig(num_hidden_layers=30)
    assert memory.padded_layers(uniform) == 30


def test_the_cache_grows_by_heads_and_is_shared_by_workers() -> None:
    config = LlamaConfig(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, hidden_size=256)
    shape = {"block": 32, "tokens": 320, "rows": 5, "longest": 64}
    whole = memory.cache_bytes(config, 2, shards=1, **shape)
    assert whole == 3 * (2 * 32 * 2 * 32 * 2) * (10 + 5 + 2 + 2)
    assert memory.cache_bytes(config, 2, shards=2, **shape) == whole // 2
    assert memory.cache_bytes(config, 2, shards=4, **shape) == whole // 2


def test_copies_on_the_host_take_nothing_of_a_gpu_and_factors_are_whole_on_every_worker() -> None:
    site = Site("layer.weight", (1000, 500))
    plain = settings((site,))
    master = plain | {"fold": "master"}
    on_gpu, on_host = ({"host": host, "shards": 1} for host in (False, True))
    assert memory.factor_bytes(master, 2, **on_gpu) == memory.factor_bytes(plain, 2, **on_gpu)
    copies = memory.factor_bytes(master, 2, **on_host) - memory.factor_bytes(plain, 2, **on_host)
    assert copies == 4 * 1000 * 500
    # The update and a direction of rank 2 in float32, and V; the layer's own factors are what workers share.
    whole = 4 * 2 * (1000 + 1000 + 500)
    assert memory.factor_bytes(plain, 2, shards=8, host=False) > whole
    assert memory.factor_bytes(plain, 2, shards=8, host=False) < memory.factor_bytes(plain, 2, **on_gpu)


def test_a_bank_and_adapter_slots_take_what_layers_hold_of_them() -> None:
    plain, (out, width) = settings((Site("layer.weight", (1000, 500)),)), (1000, 500)
    on_gpu, on_host = ({"host": host, "shards": 1} for host in (False, True))

    def more(itemsize: int, where: dict[str, Any], **changed: Any) -> int:
        with_it, without = (memory.factor_bytes(each, itemsize, **where) for each in (plain | changed, plain))
        return with_it - without

    assert more(2, on_gpu, bank_rank=64) == 2 * 64 * (out + width)
    assert more(2, on_host, bank_rank=64) == (2 + 4) * 64 * (out + width)
    # The slots of rank 2 have room for 8, and one more of them stays empty.
    assert more(4, on_gpu, adapters="lora") == 4 * 9 * 8 * (out + width)


def test_what_the_driver_alone_goes_by_is_compiled_to_the_same_code() -> None:
    def code(layers: int = 0, seed: int = 0, **method: Any) -> str:
        chosen = Method(**{"rank": 2, "interval": 3, **method})
        values = worker_settings.pack(chosen, Layout(SITES), seed, RuntimeConfig(type="vllm"))
        return worker_settings.Carried(values, layers).compute_hash()

    assert len({code(), code(seed=1), code(lr=0.5, schedule="linear", warmup_steps=3), code(eps=0.1, interval=9)}) == 1
    others = [code(), code(layers=1), code(rank=3), code(directions=2), code(weight_decay=0.1), code(family="dense")]
    assert len(set(others)) == len(others)


def test_dense_directions_take_the_largest_site_s_room_and_no_factors() -> None:
    sites = Site("small.weight", (10, 50)), Site("large.weight", (1000, 500))
    dense = settings(sites) | {"method": asdict(Method(family="dense"))}
    assert memory.factor_bytes(dense, 2, shards=1, host=False) == (8 + 2) * 1000 * 500
    assert memory.factor_bytes(dense, 2, shards=1, host=True) == (8 + 2) * 1000 * 500 + 2 * (1000 * 500 + 10 * 50)


def test_a_container_s_limit_counts_less_what_it_may_forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    unlimited = memory.available(False, 0.9)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\nactive_file 100000\ninactive_file 300000\n")
    assert memory.available(False, 0.9) == 900_000
    assert unlimited > 10_000_000


@pytest.mark.parametrize("batch", [1, 37, 736, 9000])
def test_graphs_are_captured_close_above_every_likely_batch(batch: int) -> None:
    sizes = launch.graph_sizes(batch, 16384)
    assert sizes == sorted(set(sizes))
    assert len(sizes) < 32
    for tokens in range(-(-batch // 2), batch * 5 // 4 + 1):
        above = min(size for size in sizes if size >= tokens)
        assert above - tokens <= max(8, batch / 16 + 8)
    assert max(launch.graph_sizes(batch, 64)) <= 64


def test_batches_that_are_cut_have_graphs_for_their_parts() -> None:
    assert launch.graph_sizes(100_000, 4000) == launch.graph_sizes(4000, 4000)
    for tokens in range(2000, 4001):
        above = min(size for size in launch.graph_sizes(100_000, 4000) if size >= tokens)
        assert above - tokens <= 4000 / 16 + 8


def test_starting_is_silent(checkpoint: ModelConfig) -> None:
    here = Path(__file__).parent
    code = (
        "import sys; sys.path[:0] = sys.argv[1], sys.argv[2]\n"
        "import test_launch as t; from zotune.config import ModelConfig\n"
        "llm = t.begin(ModelConfig(path=sys.argv[3])); t.launch.stop(llm)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(here), str(here.parent), checkpoint.path],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
