"""When a forward becomes a graph, and what packs are filled up with; what a graph gives is tried on a GPU."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_attention import looped
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from zotune.optimizer import Method, Optimizer
from zotune.protocol import CLEAN
from zotune.rows import Row
from zotune.runtimes.embedded import EmbeddedRuntime, attention, graphs
from zotune.runtimes.embedded.ahead import Ahead
from zotune.runtimes.embedded.graphs import Graphs, filler
from zotune.runtimes.packing import Pack, pack
from zotune.runtimes.spaces.stage import Stage
from zotune.testing import conformance, tiny

PACK = pack(tiny.rows("single", 4, longest=9), normalised=True, spans=True)
OTHER = pack(tiny.rows("single", 5, longest=9), normalised=True, spans=True)
GIVEN = torch.arange(6).view(1, 2, 3)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Pack]:
    """What was captured, by a stand-in for a graph."""
    found: list[Pack] = []

    def capture(
        forward: graphs.Forward, packed: Pack, given: Tensor, device: object, memory: object
    ) -> Callable[[Any], Tensor]:
        found.append(packed)
        forward(packed, given)
        return lambda _: torch.tensor(-1.0)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(graphs, "_Captured", capture)
    return found


def value(_: Pack, given: Tensor) -> Tensor:
    assert torch.equal(given, GIVEN)
    return torch.tensor(1.0)


def test_a_shape_is_captured_when_it_is_seen_again(captured: list[Pack]) -> None:
    made = Graphs(torch.device("cpu"))
    given = [float(made.run(value, each, GIVEN, 2, "state")) for each in (PACK, OTHER, PACK, PACK, OTHER)]
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
    made = Graphs(torch.device("cpu"))
    for _ in range(3):
        made.run(value, PACK, GIVEN, 2, "state")
    assert float(made.run(value, packed, GIVEN, blocks, state)) == 1


def test_large_packs_and_too_many_shapes_run_by_themselves(
    captured: list[Pack], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Graphs(torch.device("cpu"))
    blocks = graphs._LARGEST // len(PACK.tokens) + 1
    assert [float(made.run(value, PACK, GIVEN, blocks, 0)) for _ in range(3)] == [1, 1, 1]
    monkeypatch.setattr(graphs, "_MOST", 1)
    for each in (PACK, OTHER) * 3:
        made.run(value, each, GIVEN, 2, 0)
    assert captured == [PACK]


def test_a_model_that_cannot_be_captured_runs_by_itself(captured: list[Pack], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "_Captured", fail)
    made = Graphs(torch.device("cpu"))
    assert [float(made.run(value, PACK, GIVEN, 2, 0)) for _ in range(4)] == [1, 1, 1, 1]
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


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: operations with the tensors that they were called with, to be done again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.do(function, *args, **kwargs or {})

    def do(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, found))
        return found

    def replay(self) -> None:
        for function, args, kwargs, found in self.calls:
            for mine, new in zip(tree_leaves(found), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(mine, Tensor) and mine.data_ptr() != new.data_ptr():
                    mine.copy_(new)


class Mailbox:
    """An inbox without a GPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.there = torch.zeros(size, dtype=torch.int64)

    def write(self, tensors: Sequence[Tensor]) -> None:
        self.there.copy_(torch.cat(list(tensors)))


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """All that is captured, on tapes; attention is one operation on them, as it is on a GPU."""
    tapes, running = [], []

    @contextmanager
    def capturing(tape: Tape, **_: Any) -> Iterator[None]:
        tapes.append(tape)
        running.append(tape)
        with tape:
            yield
        running.pop()

    def attended(*args: Any, **options: Any) -> Tensor:
        if not running:
            return looped(*args, **options)
        with _disable_current_modes():
            return running[-1].do(looped, *args, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(graphs, "Inbox", Mailbox)
    monkeypatch.setattr(attention, "_kernel", attended)
    return tapes


def both(family: Any, method: Method, **options: Any) -> tuple[EmbeddedRuntime, EmbeddedRuntime]:
    """A runtime that captures graphs and gets ready ahead, and one that does neither; both on a CPU."""
    ours, plain = EmbeddedRuntime(tiny.model(family), method, **options), EmbeddedRuntime(tiny.model(family), method)
    ours._spans = plain._spans = True
    ours._graphs = Graphs(torch.device("cpu"))
    ours._ahead = Ahead(ours._packed, ours.space.directions)  # type: ignore[arg-type]
    return ours, plain


def alike(ours: EmbeddedRuntime, plain: EmbeddedRuntime) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.state().values(), plain.state().values(), strict=True))


@pytest.mark.parametrize("scope", ["all", "linear", "last-layers"])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_graph_sees_all_that_moves(
    family: Any, scope: Any, taped: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Method(scope=scope, eps=1e-2, lr=1e-3, interval=3, directions=2)
    ours, plain = both(family, method)
    made: list[Pack] = []
    monkeypatch.setattr(ours._ahead, "_pack", lambda *args: made.append(ours._packed(*args)) or made[-1])
    optimizer = Optimizer(method, 100)
    first = tiny.rows("single", 5, longest=9)
    # As long together, so of the same shape.
    batches = [first, [replace(row, prompt=row.prompt[::-1]) for row in first[::-1]]]
    for step in range(10):
        asked = optimizer.ask(step).probes
        # Right, but for every third.
        ours.expect(optimizer.ask(step + 1).probes, batches[(step + 1 + (step % 3 == 2)) % 2], normalised=False)
        # Filled up alike, the two have the same sums in the same order.
        rows = batches[step % 2]
        filled = [*rows, filler(sum(row.n_tokens for row in rows))]
        scores = ours.score(asked, rows, normalised=False)
        assert np.array_equal(scores, plain.score(asked, filled, normalised=False))
        for each in (ours, plain):
            each.apply(optimizer.update(step, (2.0, -1.0)))
    assert len(taped) == (2 if scope == "last-layers" else 1)
    assert len(made) == 10 + 1 + 3, "one for each step, for the first, and for what was not expected"
    assert alike(ours, plain)


def test_a_graph_of_a_part_of_a_batch_draws_for_itself(taped: list[Tape]) -> None:
    method = Method(eps=1e-2, lr=1e-3, interval=3)
    # Equally long rows, four in a forward, so that every part has the same graph.
    rows = [Row((3 + at, 5, 7, 9), candidates=tiny.rows("single", 1, longest=9)[0].candidates) for at in range(8)]
    ours, plain = both("llama", method, max_tokens=2 * 4 * 4)
    optimizer = Optimizer(method, 100)
    for step in range(6):
        asked = optimizer.ask(step).probes
        ours.expect(optimizer.ask(step + 1).probes, rows, normalised=False)
        scores = ours.score(asked, rows, normalised=False)
        parts = [[*part, filler(16)] for part in (rows[:4], rows[4:])]
        expected = [plain.score(asked, part, normalised=False) for part in parts]
        assert np.array_equal(scores, np.concatenate(expected, axis=1))
        for each in (ours, plain):
            each.apply(optimizer.update(step, (2.0,)))
    assert len(taped) == 1
    assert alike(ours, plain)


@pytest.mark.usefixtures("taped")
def test_a_step_whose_capture_fails_sees_its_own_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method(eps=1e-2, lr=1e-3, interval=3)
    ours, plain = both("llama", method)

    def fail(forward: graphs.Forward, packed: Pack, given: Tensor, *_: object) -> None:
        # On a GPU nothing of a capture is done.
        with monkeypatch.context() as patch:
            patch.setattr(Stage, "show", lambda *_: None)
            forward(packed, given)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "_Captured", fail)
    optimizer, rows = Optimizer(method, 100), list(tiny.rows("single", 5, longest=9))
    filled = [*rows, filler(sum(row.n_tokens for row in rows))]
    for step in range(4):
        asked = optimizer.ask(step).probes
        scores = ours.score(asked, rows, normalised=False)
        assert np.array_equal(scores, plain.score(asked, filled, normalised=False))
        for each in (ours, plain):
            each.apply(optimizer.update(step, (2.0,)))
    assert alike(ours, plain)
