"""Replicas that are vLLM engines."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("vllm")

from teams import teams

from zotune.testing import conformance
from zotune.testing.conformance import Case

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

CHECKS = (conformance.check_probes, conformance.check_updates, conformance.check_state, conformance.check_generate)
HEAD_SIZE = 32


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_engines_in_lock_step(check: Callable[[Case], None]) -> None:
    with teams(inner="vllm", unit_tokens=100) as factory:
        check(Case(factory, "llama", conformance.METHODS["all"], HEAD_SIZE))
