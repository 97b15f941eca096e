"""The peers' ways through vLLM score and learn what the dense oracle does of the same states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from engines import HEAD_SIZE, engines
from tiny_checkpoint import write

from zotune.errors import ConfigError
from zotune.optimizer import Method, Optimizer
from zotune.protocol import CLEAN, DirectionKey, Probe
from zotune.testing import tiny
from zotune.testing.baselines.lora_slots import LoraSlots
from zotune.testing.baselines.public_api import PublicApi
from zotune.testing.reference import OracleRuntime

METHOD = Method(scope="linear", eps=0.05, lr=1e-2, interval=2)
SEED = 3
STEPS = 3


@pytest.fixture(scope="module", params=["slots", "public"])
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = tiny.model("llama", head_size=HEAD_SIZE)
    if request.param == "slots":
        with engines(adapters="lora") as start:
            yield LoraSlots(start(model, METHOD, seed=SEED))
        return
    config = write(model, tmp_path_factory.mktemp("public") / "model")
    with closing(PublicApi(config, model, METHOD, seed=SEED, windows=2, longest=tiny.CONTEXT)) as made:
        yield made


def probes(step: int) -> tuple[Probe, ...]:
    key = DirectionKey(step // METHOD.interval, step, 0)
    return CLEAN, Probe(key, 1, METHOD.eps), Probe(key, -1, METHOD.eps)


def test_scores_are_the_oracles_from_window_to_window(scorer: Any) -> None:
    oracle = OracleRuntime(tiny.model("llama", head_size=HEAD_SIZE), METHOD, seed=SEED)
    optimizer = Optimizer(METHOD, STEPS)
    for step in range(STEPS):
        # Rows of one token each take another way through the public interface.
        for rows in (tiny.rows("multi", 3, seed=step), tiny.rows("single", 4, seed=step)):
            expected = oracle.score(probes(step), rows)
            np.testing.assert_allclose(scorer.score(probes(step), rows), expected, rtol=1e-4)
            assert not np.allclose(expected[1], expected[2], rtol=1e-2), "the probes do not show"
        update = optimizer.update(step, [3.0])
        oracle.apply(update)
        scorer.apply(update)


def test_what_adapters_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = tiny.model("llama", head_size=HEAD_SIZE)
    config = write(model, tmp_path / "model")
    with pytest.raises(ConfigError, match="scope 'linear'"):
        PublicApi(config, model, Method(scope="all"))
    with pytest.raises(ConfigError, match="give fewer"):
        PublicApi(config, model, METHOD, windows=1000)


def test_slots_must_be_there() -> None:
    class WithoutSlots:
        slots = None

    with pytest.raises(ConfigError, match=r"adapters = 'lora'"):
        LoraSlots(WithoutSlots())  # type: ignore[arg-type]
