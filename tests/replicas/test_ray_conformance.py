from __future__ import annotations

from collections.abc import Callable

import pytest
from teams import teams

from zotune.testing import conformance
from zotune.testing.conformance import Case

pytestmark = pytest.mark.usefixtures("ray_cluster")

FEW = (conformance.check_probes, conformance.check_updates, conformance.check_state, conformance.check_generate)


def _check(method: str, check: Callable[[Case], None], **options: object) -> None:
    with teams(**options) as factory:
        check(Case(factory, "llama", conformance.METHODS[method]))


# These ask a replica's model alone, and each begins several teams.
ALONE = (conformance.check_sites, conformance.check_fingerprint)
CHECKS = [pytest.param(check, marks=pytest.mark.slow) if check in ALONE else check for check in conformance.CHECKS]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_replicas_pass_every_check(check: Callable[[Case], None]) -> None:
    """Units are small, so that every question is cut by directions and by rows."""
    _check("all", check, unit_tokens=40)


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("dense", "lora")]


@pytest.mark.parametrize("method", ["momentum", *SLOW])
@pytest.mark.parametrize("check", FEW, ids=lambda check: check.__name__)
def test_other_methods(method: str, check: Callable[[Case], None]) -> None:
    _check(method, check)
