from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from engines import HEAD_SIZE, engines

from zotune.testing import conformance, tiny
from zotune.testing.conformance import Case

FAMILIES = ("opt", "llama", "llama-tied", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3", "mistral")
METHODS = list(conformance.METHODS)
QUICK = [("opt", "all"), ("qwen3", "all"), ("gemma2", "all"), ("gemma3", "decay")]
DENSE = [("opt", "dense"), ("llama", "lora")]
_HASH = r"[0-9a-f]{64}|[0-9a-f]{10}"
FEW = (conformance.check_probes, conformance.check_updates, conformance.check_generate)


def _check(family: str, method: str, check: Callable[[Case], None], **options: object) -> None:
    with engines(**options) as factory:
        check(Case(factory, family, conformance.METHODS[method], HEAD_SIZE))


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_llama_passes_every_check(check: Callable[[Case], None]) -> None:
    _check("llama", "all", check)


@pytest.mark.parametrize(("family", "method"), QUICK)
@pytest.mark.parametrize("check", FEW[:2], ids=lambda check: check.__name__)
def test_families(family: str, method: str, check: Callable[[Case], None]) -> None:
    _check(family, method, check)


@pytest.mark.parametrize(("family", "method"), DENSE)
def test_dense_directions(family: str, method: str) -> None:
    _check(family, method, conformance.check_updates)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), list(itertools.product(FAMILIES, METHODS)))
@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_every_family_and_method(family: str, method: str, check: Callable[[Case], None]) -> None:
    _check(family, method, check)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
@pytest.mark.parametrize("check", FEW, ids=lambda check: check.__name__)
def test_compiled(family: str, check: Callable[[Case], None]) -> None:
    _check(family, "all", check, compile=True)


@pytest.mark.slow
def test_a_run_with_another_seed_finds_what_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    for seed in (0, 1):
        with engines(compile=True, own_process=True, models=tmp_path / "models") as factory:
            case = Case(factory, "llama", conformance.METHODS["all"], HEAD_SIZE)
            runtime, reference = case.both(seed=seed)
            rows, probes = tiny.rows("mixed", 5), case.probes()
            conformance.assert_close(runtime.score(probes, rows), reference.score(probes, rows))
        # The folder of a hash: of a whole model where PyTorch can keep that, else of its parts.
        kept = [each for each in (tmp_path / "torch_compile_cache").rglob("*") if re.fullmatch(_HASH, each.name)]
        assert len({each.name for each in kept}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("check", FEW, ids=lambda check: check.__name__)
def test_a_process_of_its_own(family: str, check: Callable[[Case], None]) -> None:
    _check(family, "all", check, own_process=True)
