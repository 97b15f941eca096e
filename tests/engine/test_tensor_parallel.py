"""Two workers that share every layer: each draws the same direction and takes its slice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from engines import HEAD_SIZE, engines

from zotune.optimizer import Method
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.testing import conformance, tiny
from zotune.testing.conformance import Case


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "all"),
        pytest.param("gpt2", "dense", marks=pytest.mark.slow),
        pytest.param("llama-tied", "dense", marks=pytest.mark.slow),
        pytest.param("llama", "lora", marks=pytest.mark.slow),
        pytest.param("gpt2", "lora", marks=pytest.mark.slow),
    ],
)
def test_two_workers_are_the_oracle(family: str, method: str) -> None:
    with engines(tensor_parallel=2) as factory:
        case = Case(factory, family, conformance.METHODS[method], HEAD_SIZE)
        conformance.check_updates(case)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("gpt2", torch.float32), ("llama-tied", torch.bfloat16)])
def test_folds_of_shards_give_the_bits_of_the_whole(family: str, dtype: torch.dtype) -> None:
    method = Method(eps=1e-2, lr=1e-3, interval=3)
    whole = EmbeddedRuntime(tiny.model(family, dtype, head_size=HEAD_SIZE), method)
    with engines(tensor_parallel=2) as factory:
        case = Case(factory, family, method, HEAD_SIZE)
        runtime = factory(case.model(dtype), method)
        for update in case.updates(4):
            runtime.apply(update)
            whole.apply(update)
        state, expected = runtime.state(), whole.state()
        assert state.keys() == expected.keys()
        assert [name for name in state if not torch.equal(state[name], expected[name])] == []
        rows, probes = tiny.rows("mixed", 5, seed=3), case.probes(4)
        tolerance = 1e-4 if dtype == torch.float32 else 0.5
        np.testing.assert_allclose(runtime.score(probes, rows), whole.score(probes, rows), atol=tolerance, rtol=1e-4)
        runtime.load_state(expected, window=1)
        np.testing.assert_array_equal(runtime.state()["factors"], expected["factors"])
