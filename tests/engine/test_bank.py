"""The update bank: finished windows beside the weights, folded when it is full, recompressed where they cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from engines import HEAD_SIZE, engines

from zotune.errors import ModelError
from zotune.layout import Site
from zotune.optimizer import Method
from zotune.protocol import CLEAN
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.engine.bank import Bank, settled, truncated
from zotune.runtimes.engine.tokens import Part, TokenMix, TunedVector
from zotune.runtimes.engine.tokenwise import TokenSpace, TunedMatrix
from zotune.runtimes.spaces.lowrank import LowRankMatrix
from zotune.runtimes.spaces.mixture import Vector
from zotune.testing import conformance, tiny
from zotune.testing.conformance import Case

METHOD = Method(scope="all", eps=1e-2, lr=1e-3, interval=2)
DECAY = replace(METHOD, lr=1e-2, weight_decay=2.0)
MOMENTUM = replace(METHOD, momentum=0.9)
BUDGET = 6
"""Three windows of rank 2; the third fills it, so the bank is folded and starts anew."""

CPU = torch.device("cpu")


@pytest.fixture
def factory() -> Iterator[Any]:
    with engines(bank_rank=BUDGET) as start:
        yield start


def _weights(runtime: EmbeddedRuntime) -> dict[str, torch.Tensor]:
    return {name: runtime.tuned()[name].float() for name in (site.name for site in runtime.layout.sites)}


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama-tied", METHOD), ("opt", DECAY), ("gpt2", MOMENTUM)],
    ids=["tied", "decay", "momentum"],
)
def test_a_bank_is_the_oracle(factory: Any, family: str, method: Method) -> None:
    # Eight steps are four windows: the bank grows, is folded, and grows again.
    case = Case(factory, family, method, HEAD_SIZE)
    runtime, reference = case.both()
    rows = tiny.rows("mixed", 5, seed=2)
    for step, update in enumerate(case.updates(9)):
        conformance.assert_close(runtime.score(case.probes(step), rows), reference.score(case.probes(step), rows))
        runtime.apply(update)
        reference.apply(update)
    assert runtime.generate([(5, 6, 7)], max_new_tokens=4) == reference.generate([(5, 6, 7)], max_new_tokens=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_replay_without_a_bank_gives_the_same_factors_and_weights(factory: Any, dtype: torch.dtype) -> None:
    case = Case(factory, "llama", METHOD, HEAD_SIZE)
    runtime = factory(case.model(dtype), METHOD)
    replays = [EmbeddedRuntime(case.model(dtype).to(kind), METHOD) for kind in (torch.float32, dtype)]
    largest = {site.name: torch.zeros(site.shape) for site in runtime.layout.sites}
    for update in case.updates(9):
        runtime.apply(update)
        for replay in replays:
            replay.apply(update)
        for name, size in largest.items():
            torch.maximum(size, replays[0].state()[f"weight/{name}"].abs(), out=size)
    state, (exact, folded) = runtime.state(), (replay.state() for replay in replays)
    assert torch.equal(state["factors"], folded["factors"])
    # Four windows: three filled the bank and were folded together, the fourth is in it.
    assert state["bank/columns"][:, 0].max() == METHOD.rank
    mine = settled({name: each.float() if "weight/" in name else each for name, each in state.items()})
    for name, size in largest.items():
        # A fold moves a weight by less than one step of its format. The engine has folded once, the replay four times.
        # Both have rounded in float32 at every window, or as often as a product has columns.
        step = torch.finfo(dtype).eps * size + 16 * torch.finfo(torch.float32).eps * size.max()
        mine_off, folded_off = ((each[f"weight/{name}"] - exact[f"weight/{name}"]).abs() for each in (mine, folded))
        assert bool((mine_off < step).all()), name
        assert bool((folded_off < 4 * step).all()), name


def test_with_float32_copies_a_replay_is_within_one_rounding() -> None:
    with engines(fold="master", bank_rank=BUDGET) as factory:
        case = Case(factory, "llama", METHOD, HEAD_SIZE)
        runtime = factory(case.model(torch.bfloat16), METHOD)
        embedded = EmbeddedRuntime(case.model(torch.bfloat16), METHOD, fold="master")
        for update in case.updates(9):
            runtime.apply(update)
            embedded.apply(update)
        mine, theirs = settled(runtime.state()), embedded.state()
    assert mine.keys() == theirs.keys()
    for name in (name for name in theirs if name.startswith("master/")):
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-5, rtol=1e-5)
    embedded.load_state(mine, 4)


def test_a_state_restores_a_bank(factory: Any) -> None:
    case = Case(factory, "llama", DECAY, HEAD_SIZE)
    runtime, rows, updates = case.runtime(), tiny.rows("mixed", 4, seed=4), case.updates(8)
    kept = {}
    for number, update in enumerate(updates):
        runtime.apply(update)
        if number == 4:
            kept = {name: tensor.clone() for name, tensor in runtime.state().items()}
    expected, scores = runtime.state(), runtime.score([CLEAN], rows)
    runtime.load_state(kept, window=2)
    assert [name for name, tensor in runtime.state().items() if not torch.equal(tensor, kept[name])] == []
    for update in updates[5:]:
        runtime.apply(update)
    assert [name for name, tensor in runtime.state().items() if not torch.equal(tensor, expected[name])] == []
    np.testing.assert_array_equal(runtime.score([CLEAN], rows), scores)


def test_a_budget_without_room_for_two_windows_is_refused() -> None:
    with (
        engines(bank_rank=3) as factory,
        pytest.raises(ModelError, match=r"bank_rank is 3.* Set it to 4 or more"),
    ):
        factory(tiny.model("llama", head_size=HEAD_SIZE), METHOD)


def test_truncation_is_the_best_there_is() -> None:
    draw = torch.Generator().manual_seed(0)
    b, v = torch.randn(50, 12, generator=draw), torch.randn(9, 12, generator=draw)
    for rank in (1, 4, 9, 12):
        left, right, kept, cut = truncated(b, v, rank)
        assert left.shape[1] == right.shape[1] == min(rank, 9)
        spectrum = torch.linalg.svdvals(b.double() @ v.double().T)
        assert cut == pytest.approx(float(spectrum[rank:].norm()), rel=1e-4, abs=1e-3)
        assert kept == pytest.approx(float(spectrum[:rank].norm()), rel=1e-4)
        assert float((b @ v.T - left @ right.T).norm()) == pytest.approx(cut, rel=1e-3, abs=1e-3)


def test_a_bias_of_sixteen_bits_is_shown_with_one_rounding() -> None:
    sites = Site("layer.weight", (40, 30)), Site("layer.bias", (40,))
    method = Method(rank=2, interval=3, lr=0.1)
    mix, whole = TokenMix(8, 1, torch.bfloat16, CPU), slice(0, 40)
    weight, bias = (Part(site, whole, slice(None)) for site in sites)
    module = TunedMatrix([weight], sites[0].shape, method.rank, mix, [bias])
    space = TokenSpace(list(sites), method, 0, mix)
    space.attach([module])
    bank = Bank(space, 12, list(sites), lambda: pytest.fail("a quantised weight was asked for"))
    case = Case(lambda *_, **__: None, "llama", method)  # type: ignore[arg-type, return-value]
    for update in case.updates(10):
        bank.apply(update) if update.closes_window else space.apply(update, {}, bank)
        exact = bank.stacks[sites[1]].b + space.sites[sites[1]].update
        assert torch.equal(module.vector(), exact.bfloat16())
    assert bank.stacks[sites[1]].b.any()


def test_a_bank_on_the_host_is_shown_to_vectors_that_are_elsewhere() -> None:
    # A device without memory stands for a GPU: it refuses, too, to add what is on the host.
    site, elsewhere = Site("norm.weight", (6,)), torch.device("meta")
    module = TunedVector([Part(site, slice(0, 6), slice(None))], 6, TokenMix(8, 1, torch.bfloat16, elsewhere))
    state = Vector(torch.zeros(6, device=elsewhere))
    space = SimpleNamespace(method=METHOD, sites={site: state}, modules=[module])
    bank = Bank(cast("TokenSpace", space), 4, (), lambda: pytest.fail("no window was closed"))
    bank.show(space.modules)
    assert bank.stacks[site].b.device == CPU


def test_recompression_keeps_within_the_error_that_it_states() -> None:
    site = Site("layer.weight", (40, 30))
    method = Method(rank=2, interval=1, lr=1.0, weight_decay=0.1)
    mix = TokenMix(8, 1, torch.bfloat16, CPU)
    module = TunedMatrix([Part(site, slice(0, 40), slice(None))], site.shape, method.rank, mix)
    space = TokenSpace([site], method, 0, mix)
    space.attach([module])
    bank = Bank(space, 12, [site], lambda: pytest.fail("a quantised weight was asked for"))
    addresses = [tensor.data_ptr() for tensor in (module.bank.b, module.bank.v)] if module.bank else []
    exact = torch.zeros(site.shape, dtype=torch.float64)
    case = Case(lambda *_, **__: None, "llama", method)  # type: ignore[arg-type, return-value]
    for step, update in enumerate(replace(each, lr=0.1) for each in case.updates(20)):
        state = space.sites[site]
        assert isinstance(state, LowRankMatrix)
        u = space.directions.factors.views(sum(c * space.directions.draw(key) for key, c in update.terms))[0]
        exact = 0.99 * exact - 0.1 * u.double() @ state.v.double().T
        bank.apply(update)
        assert space.window == step + 1
    stack, reports = bank.stacks[site], bank.about()["recompressed"]
    found = stack.b[:, : stack.used] @ stack.v[:, : stack.used].T if stack.v is not None else torch.empty(0)
    error = float((found - exact).norm() / exact.norm())
    # Full after six windows, and again after every three more.
    assert [report[0] for report in reports] == [5, 8, 11, 14, 17]
    assert all(worst == mean > 0 for _, worst, mean in reports)
    assert 0.01 < error < stack.lost / float(exact.norm()) * 1.001
    assert stack.keep == pytest.approx(0.99**20)
    assert module.bank is not None
    assert [module.bank.b.data_ptr(), module.bank.v.data_ptr()] == addresses
    x = torch.randn(8, 30, generator=torch.Generator().manual_seed(1)).bfloat16()
    shown = module.bank.add_to(torch.zeros(8, 40, dtype=torch.bfloat16), x).float()
    torch.testing.assert_close(shown, x.float() @ found.T, atol=0.3, rtol=0.05)
    with pytest.raises(ModelError, match=r"layer.weight is quantised.* Export an adapter"):
        settled(bank.state())
