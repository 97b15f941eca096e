"""When a forward becomes a graph, and what packs are filled up with; what a graph gives is tried on a GPU."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from zotune.protocol import CLEAN
from zotune.rows import Row
from zotune.runtimes import graphs
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.graphs import Graphs, filler
from zotune.runtimes.packing import Pack, pack
from zotune.testing import conformance, tiny

PACK = pack(tiny.rows("single", 4, longest=9), normalised=True, spans=True)
OTHER = pack(tiny.rows("single", 5, longest=9), normalised=True, spans=True)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Pack]:
    """What was captured, by a stand-in for a graph."""
    found: list[Pack] = []

    def capture(forward: Callable[[Pack], Tensor], packed: Pack, memory: object) -> Callable[[Pack], Tensor]:
        found.append(packed)
        forward(packed)
        return lambda _: torch.tensor(-1.0)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(graphs, "_Captured", capture)
    return found


def value(_: Pack) -> Tensor:
    return torch.tensor(1.0)


def test_a_shape_is_captured_when_it_is_seen_again(captured: list[Pack]) -> None:
    made = Graphs()
    given = [float(made.run(value, each, 2, "state")) for each in (PACK, OTHER, PACK, PACK, OTHER)]
    assert given == [1, 1, -1, -1, -1]
    assert captured == [PACK, OTHER]


@pytest.mark.parametrize(
    ("packed", "blocks", "state"),
    [
        (PACK, 3, "state"),
        (PACK, 2, "another"),
        (OTHER, 2, "state"),
        (replace(PACK, vocabulary=torch.arange(2)), 2, "state"),
        (replace(PACK, spans=replace(PACK.spans, longest=(256, 256))), 2, "state"),  # type: ignore[type-var]
    ],
    ids=["blocks", "state", "shape", "vocabulary", "longest"],
)
@pytest.mark.usefixtures("captured")
def test_whatever_makes_a_difference_has_a_graph_of_its_own(packed: Pack, blocks: int, state: str) -> None:
    made = Graphs()
    for _ in range(3):
        made.run(value, PACK, 2, "state")
    assert float(made.run(value, packed, blocks, state)) == 1


def test_large_packs_and_too_many_shapes_run_by_themselves(
    captured: list[Pack], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Graphs()
    blocks = graphs._LARGEST // len(PACK.tokens) + 1
    assert [float(made.run(value, PACK, blocks, 0)) for _ in range(3)] == [1, 1, 1]
    monkeypatch.setattr(graphs, "_MOST", 1)
    for each in (PACK, OTHER) * 3:
        made.run(value, each, 2, 0)
    assert captured == [PACK]


def test_a_model_that_cannot_be_captured_runs_by_itself(captured: list[Pack], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "_Captured", fail)
    made = Graphs()
    assert [float(made.run(value, PACK, 2, 0)) for _ in range(4)] == [1, 1, 1, 1]
    assert not captured


def test_lengths_become_few() -> None:
    filled = {tokens: tokens + filler(tokens).n_tokens for tokens in range(1, 8000)}
    assert all(total > tokens for tokens, total in filled.items())
    assert all(total - tokens <= max(16, tokens / 15) for tokens, total in filled.items())
    assert len({filled[tokens] for tokens in range(256, 512)}) == 16
    assert len({filled[tokens] for tokens in range(2700, 3200)}) <= 5


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_filling_up_changes_no_score(family: str) -> None:
    rows: list[Row] = list(tiny.rows("single", 5, longest=9))
    runtime = EmbeddedRuntime(tiny.model(family), conformance.METHODS["all"])  # type: ignore[arg-type]
    filled = [*rows, filler(sum(row.n_tokens for row in rows))]
    scores, expected = (runtime.score([CLEAN], each, normalised=False) for each in (filled, rows))
    assert scores.shape == expected.shape
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
