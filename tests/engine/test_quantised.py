"""Quantised checkpoints as read-only bases: what is learnt lies in the update bank beside them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

import quantised
from safetensors.torch import load_file
from tiny_runs import Recorder, configure
from vllm import envs

import zotune
from zotune.config import EngineConfig, ModelConfig, RuntimeConfig
from zotune.errors import ModelError
from zotune.journal import Journal
from zotune.optimizer import Method, Optimizer
from zotune.protocol import CLEAN
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.engine import checkpoint_layout
from zotune.runtimes.engine.runtime import EngineRuntime, Work
from zotune.testing import tiny
from zotune.testing.conformance import Case
from zotune.testing.reference import OracleRuntime

METHOD = Method(scope="all", eps=1e-2, lr=1e-3, interval=2)
LINEAR = Method(scope="linear", eps=1e-2, lr=1e-3, interval=2)
INT8, FP8 = "compressed-tensors W8A8", "compressed-tensors FP8"
ROWS = tiny.rows("mixed", 8, seed=2)


WIDE = "AVX512" in torch.backends.cpu.get_cpu_capability()
"""Whether vLLM's build has kernels here for 4 bits, and for 8 bits without sums that saturate."""

TILES = torch.cpu._is_amx_tile_supported() and not hasattr(envs, "VLLM_CPU_SGL_KERNEL")
"""Whether vLLM takes its kernel of 8 bits that is made for AMX, for 16-bit models alone, without being asked to."""


@pytest.fixture
def float32_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM take those kernels of 8 bits that run in float32 wherever AVX-512 is."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@contextmanager
def started(config: ModelConfig, method: Method, bank_rank: int) -> Iterator[EngineRuntime]:
    model, _ = checkpoint_layout.load(config)
    options = RuntimeConfig(type="vllm", vllm=EngineConfig(bank_rank=bank_rank))
    work = Work(step_tokens=512, longest=tiny.CONTEXT, largest=96)
    runtime = EngineRuntime.start(config, model, method, seed=0, options=options, work=work)
    try:
        yield runtime
    finally:
        runtime.close()


def _case(method: Method) -> Case:
    return Case(lambda *_, **__: None, "llama", method)  # type: ignore[arg-type, return-value]


@pytest.mark.usefixtures("float32_kernels")
@pytest.mark.parametrize(
    ("kind", "method"),
    [(INT8, METHOD), (FP8, LINEAR), pytest.param(FP8, METHOD, marks=pytest.mark.slow)],
    ids=["int8-all", "fp8-linear", "fp8-all"],
)
def test_formats_that_round_inputs_are_the_dequantised_model(tmp_path: Path, kind: str, method: Method) -> None:
    if kind == INT8 and not WIDE:
        pytest.skip("vLLM's own products of 8 bits saturate on a processor without AVX-512")
    config, exact = quantised.quantise(quantised.model(torch.float32), kind, tmp_path)
    unrounded = copy.deepcopy(exact)
    for module in unrounded.modules():
        module._forward_hooks.clear()
    reference, coarse, case = OracleRuntime(exact, method), OracleRuntime(unrounded, method), _case(method)
    off, allowed = [], []
    with started(config, method, bank_rank=16) as runtime:
        shapes = {site.name: site.shape for site in reference.layout.sites}
        assert {site.name: site.shape for site in runtime.layout.sites} == shapes
        for step, update in enumerate(case.updates(5)):
            found, expected, other = (side.score(case.probes(step), ROWS) for side in (runtime, reference, coarse))
            off.append(np.abs(found - expected))
            allowed.append(np.abs(other - expected))
            for side in (runtime, reference, coarse):
                side.apply(update)
    # Float32 sums differ by 1e-6, which now and then rounds an input to the other of its two neighbours. Few scores
    # then differ, and by less than what all of the rounding is worth.
    assert np.quantile(off, 0.7) < 1e-4 < 1e-2 < np.quantile(allowed, 0.5)
    assert np.max(off) < np.max(allowed)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("GPTQ", "compressed-tensors W4A16")]


@pytest.mark.parametrize("kind", ["AWQ", *SLOW, INT8])
def test_16_bit_models_of_any_format_are_the_dequantised_model(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (TILES if kind == INT8 else WIDE):
        pytest.skip("vLLM has no kernel of 4 bits on a processor without AVX-512, and none of 8 for AMX without that")
    # With AMX vLLM rounds the inputs of weights of 4 bits to 8 bits, unless it is told not to.
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    config, exact = quantised.quantise(quantised.model(), kind, tmp_path)
    case, found, expected, short = _case(METHOD), [], [], []
    sides = EmbeddedRuntime(copy.deepcopy(exact), METHOD), EmbeddedRuntime(copy.deepcopy(exact).bfloat16(), METHOD)
    with started(config, METHOD, bank_rank=16) as runtime:
        for step, update in enumerate(case.updates(7)):
            for scores, side in zip((found, expected, short), (runtime, *sides), strict=True):
                scores.append(side.score(case.probes(step), ROWS))
                side.apply(update)
    off, allowed = (np.abs(np.stack(each) - np.stack(expected)) for each in (found, short))
    # Kernels that take 16-bit models alone. What that costs, the dequantised model shows in the same 16 bits.
    assert off.mean() < 1.2 * allowed.mean() < 0.05
    assert off.max() < 2 * allowed.max()


@pytest.mark.skipif(not TILES, reason="vLLM's other kernel of 8 bits takes float32")
def test_a_kernel_that_does_not_take_the_dtype_is_named_with_what_to_do(tmp_path: Path) -> None:
    config, _ = quantised.quantise(quantised.model(torch.float32), INT8, tmp_path)
    with (
        pytest.raises(ModelError, match=r"q_proj.weight' cannot run here in float32.*Use another model.dtype"),
        started(config, METHOD, bank_rank=8),
    ):
        pass


@pytest.mark.usefixtures("float32_kernels")
def test_a_full_bank_is_cut_within_its_stated_error(tmp_path: Path) -> None:
    config, exact = quantised.quantise(quantised.model(torch.float32), INT8, tmp_path)
    case, sites = _case(METHOD), EmbeddedRuntime(copy.deepcopy(exact), METHOD).layout.sites
    base = {name: parameter.detach().clone() for name, parameter in exact.named_parameters()}
    reference = EmbeddedRuntime(exact, METHOD)
    with started(config, METHOD, bank_rank=8) as runtime:
        for update in case.updates(16):
            runtime.apply(update)
            reference.apply(update)
        # Eight windows of rank 2: four fill the budget and are cut to rank 4, two and two more fill it again.
        about, state = runtime.call("bank")[0], runtime.state()
        assert [step for step, _, _ in about["recompressed"]] == [7, 11, 15]
        _, worst, mean = about["recompressed"][-1]
        told = runtime.news()
        assert [text.partition(":")[0] for text in told] == ["step 8", "step 12", "step 16"]
        assert f"a relative error of {mean:.1e} on average, {worst:.1e} at worst" in told[-1]
        assert runtime.news() == []
        scores = runtime.score([CLEAN], ROWS)
        with pytest.raises(ModelError, match=r"is quantised.*Export an adapter"):
            runtime.export(tmp_path / "out")
    with started(config, METHOD, bank_rank=8) as runtime:
        runtime.load_state(state, window=8)
        np.testing.assert_array_equal(runtime.score([CLEAN], ROWS), scores)
    errors = []
    for site in sites:
        learnt = reference.state()[f"weight/{site.name}"] - base[site.name]
        if f"weight/{site.name}" in state:
            torch.testing.assert_close(
                _whole(state, site.name) + state[f"weight/{site.name}"] - base[site.name], learnt
            )
        else:
            errors.append(float((_whole(state, site.name) - learnt).norm() / learnt.norm()))
    assert len(errors) == 14
    assert 0.1 < max(errors) <= worst < 2
    assert 0.1 < np.mean(errors) <= mean <= worst


def _whole(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    b = state[f"bank/b/{name}"]
    return b @ state[f"bank/v/{name}"].T if b.dim() == 2 else b


@pytest.mark.usefixtures("float32_kernels")
def test_what_a_quantised_base_learnt_leaves_as_an_adapter(
    tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]
) -> None:
    base = tmp_path / "base"
    _, exact = quantised.quantise(quantised.model(torch.float32), FP8, base)
    for each in tiny_model_folder.glob("token*"):
        shutil.copy(each, base)
    ran = configure(
        tmp_path,
        base,
        sentiment_files,
        method={"scope": "linear", "lr": 1e-2, "interval": 2},
        train={"steps": 6},
        runtime={"type": "vllm", "threads": None, "vllm": {"bank_rank": 16}},
    )
    zotune.start(ran, Recorder())
    with pytest.raises(ModelError, match=r"is quantised.*as an adapter \(--format peft\)"):
        zotune.export_run(ran.output, tmp_path / "merged", "merged")
    assert not (tmp_path / "merged").exists()
    exported = zotune.export_run(ran.output, tmp_path / "peft", "peft")
    assert exported.rank == 8, "three windows of rank 2, filled up"
    adapter = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    journal = Journal.open(Path(ran.output) / "journal.jsonl")
    runtime = EmbeddedRuntime(exact, Method(**journal.header.method), seed=journal.header.seed, fold="master")
    before = {name: tensor.clone() for name, tensor in runtime.tuned().items()}
    for entry in journal.entries:
        runtime.apply(Optimizer(runtime.method, 6).update(entry.step, entry.coefficients, entry.lr))
    for name, tensor in runtime.tuned().items():
        if (a := adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")) is not None:
            b = adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
            torch.testing.assert_close(b @ a, tensor - before[name], rtol=1e-3, atol=1e-6)
            assert (b @ a).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (METHOD, r"0\.self_attn\.q_proj\.weight is quantised \(.*AWQ.*Set runtime\.vllm\.bank_rank"),
        (Method(family="dense"), r"q_proj\.weight is quantised \(.*AWQ.*Use a low-rank preset"),
        (Method(family="dense", lora_rank=2), r"this model's are quantised\. Use a low-rank preset"),
    ],
    ids=["low-rank", "dense", "lora"],
)
def test_without_a_bank_a_quantised_layer_is_refused_by_name(tmp_path: Path, method: Method, message: str) -> None:
    config, _ = quantised.quantise(quantised.model(), "AWQ", tmp_path)
    with pytest.raises(ModelError, match=message), started(config, method, bank_rank=0):
        pass


def test_a_format_without_a_kernel_is_refused_with_the_engines_reason(tmp_path: Path) -> None:
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has a kernel for FP8 with block scales")
    config, _ = quantised.quantise(quantised.model(), "FP8 blocks", tmp_path)
    with pytest.raises(ModelError, match="requires AMX tile support"), started(config, METHOD, bank_rank=16):
        pass


@pytest.mark.skipif(WIDE, reason="this processor has a kernel of 4 bits")
def test_a_kernel_that_this_processor_lacks_is_named_with_the_layer(tmp_path: Path) -> None:
    config, _ = quantised.quantise(quantised.model(), "AWQ", tmp_path)
    with (
        pytest.raises(
            ModelError, match=r"the layer of 'model\.layers\.0\..*' cannot run here in bfloat16, for vLLM has no"
        ),
        started(config, METHOD, bank_rank=16),
    ):
        pass


def test_a_checkpoint_is_known_without_loading_it(tmp_path: Path) -> None:
    made = quantised.model()
    config, _ = quantised.quantise(made, "GPTQ", tmp_path / "one")
    model, _ = checkpoint_layout.load(config)
    named = dict(model.named_parameters())
    for name, parameter in made.named_parameters():
        assert named[name].shape == parameter.shape
        assert named[name].is_meta == (".layers." in name and parameter.dim() == 2)
        assert named[name].is_meta or torch.equal(named[name], parameter)
    print_of_one = checkpoint_layout.fingerprint(config, model)
    assert checkpoint_layout.fingerprint(config, checkpoint_layout.load(config)[0]) == print_of_one
    with torch.no_grad():
        made.model.layers[1].mlp.up_proj.weight[0, 0] += 0.5
    other, _ = quantised.quantise(made, "GPTQ", tmp_path / "other")
    assert checkpoint_layout.fingerprint(other, checkpoint_layout.load(other)[0]) != print_of_one
    (tmp_path / "other" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot read the weights of the quantised model"):
        checkpoint_layout.load(other)
