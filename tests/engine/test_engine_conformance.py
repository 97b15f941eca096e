from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

pytest.importorskip("vllm")

from engines import HEAD_SIZE, engines

from zotune.testing import conformance
from zotune.testing.conformance import Case

FAMILIES = ("opt", "llama", "llama-tied", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3", "mistral")
METHODS = list(conformance.METHODS)
QUICK = [("opt", "all"), ("qwen3", "all"), ("gemma2", "all"), ("gemma3", "decay")]
DENSE = [("opt", "dense"), ("llama", "lora")]
FEW = (conformance.check_probes, conformance.check_updates, conformance.check_generate)


def _check(family: str, method: str, check: Callable[[Case], None], **options: object) -> None:
    with engines(**options) as factory:
        check(Case(factory, family, conformance.METHODS[method], HEAD_SIZE))


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_llama_passes_every_check(check: Callable[[Case], None]) -> None:
    _check("llama", "all", check)


@pytest.mark.parametrize(("family", "method"), QUICK + DENSE)
@pytest.mark.parametrize("check", FEW[:2], ids=lambda check: check.__name__)
def test_families(family: str, method: str, check: Callable[[Case], None]) -> None:
    _check(family, method, check)


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
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("check", FEW, ids=lambda check: check.__name__)
def test_a_process_of_its_own(family: str, check: Callable[[Case], None]) -> None:
    _check(family, "all", check, own_process=True)
