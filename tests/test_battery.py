"""The preset battery on the embedded runtime."""

from typing import Any

import pytest

from zotune.presets import PRESETS
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.testing import battery

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str, check: Any) -> None:
    if PRESETS[name].method.lora_rank is not None:
        pytest.importorskip("peft")
    check(PRESETS[name], EmbeddedRuntime)


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_the_battery_catches_a_runtime_that_does_not_learn(sign: float) -> None:
    class Wrong(EmbeddedRuntime):
        def apply(self, update: Any) -> None:
            terms = tuple((key, sign * coefficient) for key, coefficient in update.terms)
            super().apply(type(update)(update.step, update.window, terms, update.lr, update.closes_window))

    with pytest.raises(AssertionError, match="loss"):
        battery.check_learns(PRESETS["lozo"], Wrong)
