"""Factors beside weights: which layers have room, what is stored, and how often an output is rounded.

That scores, updates and state are the oracle's is shown by `tests/test_conformance.py`.
"""

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from zotune.optimizer import Method
from zotune.protocol import CLEAN, DirectionKey, Probe, Update
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.sites import decoder_layers
from zotune.runtimes.spaces import appended
from zotune.testing import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = tiny.rows("mixed", 5, seed=1)
ATTENTION = ("q_proj", "k_proj", "v_proj")


def probes(*directions: int) -> list[Probe]:
    return [Probe(DirectionKey(0, 0, number), sign, 0.1) for number in directions for sign in (1, -1)]


def room(
    *outputs: int, inputs: int = 512, dtype: torch.dtype = torch.bfloat16, tuned: str = "wb", **method: Any
) -> int:
    names = [f"layer{number}" for number in range(len(outputs))]
    layers = [nn.Linear(inputs, each, dtype=dtype) for each in outputs]
    parameters = {"w": "weight", "b": "bias"}
    kept = [f"{name}.{parameters[each]}" for name in names for each in tuned]
    return appended.room(layers, names, kept, Method(**method))


def test_room_is_for_layers_that_are_no_wider_than_their_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appended, "product_dtype", lambda dtype, device: dtype)
    assert room(512) == 32
    assert room(256, 128, 128) == 32
    assert room(511) == 0, "outputs are cheaper to write twice"
    assert room(512, tuned="") == 0
    assert room(512, dtype=torch.float32) == 0
    # Six terms, of as many columns as the rank and one for the bias; a quarter of the inputs is 128.
    assert (room(512, directions=5, rank=9), room(512, directions=5, rank=10)) == (64, 96)
    assert (room(512, directions=5, rank=21), room(512, directions=5, rank=21, tuned="w")) == (0, 128)
    assert not appended.pays(torch.bfloat16, "cuda"), "a GPU writes outputs as fast as it reads"
    monkeypatch.setattr(appended, "product_dtype", lambda dtype, device: torch.float32)
    assert room(512) == 0, "16-bit products are not what is computed"


@pytest.mark.usefixtures("everywhere_beside")
def test_weights_are_stored_once_and_a_model_is_given_back_as_it_was(tmp_path: Path) -> None:
    model = tiny.model("llama")
    before = copy.deepcopy(model.state_dict())
    runtime = EmbeddedRuntime(model, Method(scope="last-layers", directions=2))
    attention = decoder_layers(model)[1].self_attn
    storages = {getattr(attention, name).weight.untyped_storage().data_ptr() for name in ATTENTION}
    assert len(storages) == 1
    columns = 32 + 3 * 3 * 2
    assert attention.q_proj.weight.untyped_storage().nbytes() == 4 * (32 + 16 + 16) * columns
    runtime.score(probes(0, 1), ROWS)
    runtime.close()
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert attention.q_proj.weight.untyped_storage().nbytes() == 4 * (32 + 16 + 16) * 32
    model.save_pretrained(tmp_path)
    for state in (model.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()):
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


@pytest.mark.usefixtures("everywhere_beside")
def test_what_was_shown_before_is_not_seen_by_fewer_directions() -> None:
    method = Method(directions=2)
    used, fresh = (EmbeddedRuntime(tiny.model("opt"), method) for _ in range(2))
    used.score(probes(0, 1), ROWS)
    for asked in ([CLEAN], probes(1), [CLEAN, *probes(0)]):
        np.testing.assert_array_equal(used.score(asked, ROWS), fresh.score(asked, ROWS))


@pytest.mark.usefixtures("everywhere_beside")
def test_fewer_directions_than_there_is_room_for_are_seen_as_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = EmbeddedRuntime(tiny.model("opt"), Method(directions=3))
    monkeypatch.setattr(appended, "pays", lambda dtype, device: False)
    alone = EmbeddedRuntime(tiny.model("opt"), Method(directions=3))
    key = DirectionKey(0, 0, 1)
    minus, nearer, nowhere = Probe(key, -1, 0.1), Probe(key, -1, 0.05), Probe(key, 1, 1e-60)
    for asked in (probes(0, 1, 2), probes(1), [CLEAN, *probes(2, 0)], [minus], [*probes(1), nearer], [nowhere]):
        np.testing.assert_allclose(runtime.score(asked, ROWS), alone.score(asked, ROWS), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("everywhere_beside")
def test_factors_are_taken_whole_or_not_where_probes_are_equally_far() -> None:
    runtime = EmbeddedRuntime(tiny.model("opt"), Method())
    product = decoder_layers(runtime.model)[0].fc1.forward.matrix
    for asked in (probes(0), [Probe(DirectionKey(0, 0, 0), -1, 0.1)], [CLEAN]):
        runtime.score(asked, ROWS)
        assert set(product.amounts.flatten().tolist()) <= {-1.0, 0.0, 1.0}


@pytest.mark.usefixtures("everywhere_beside")
def test_more_directions_than_there_is_room_for_are_scored_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = EmbeddedRuntime(tiny.model("llama"), Method(directions=2))
    asked: list[int] = []
    scored = runtime._score_blocks
    monkeypatch.setattr(runtime, "_score_blocks", lambda part, *rest: asked.append(len(part)) or scored(part, *rest))
    scores = runtime.score([CLEAN, *probes(0, 1, 2, 3, 4)], ROWS)
    assert asked == [5, 4, 2]
    monkeypatch.setattr(appended, "pays", lambda dtype, device: False)
    alone = EmbeddedRuntime(tiny.model("llama"), Method(directions=2))
    np.testing.assert_allclose(scores, alone.score([CLEAN, *probes(0, 1, 2, 3, 4)], ROWS), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("everywhere_beside")
@pytest.mark.parametrize("decay", [0.0, 30.0])
def test_an_output_is_rounded_once_with_its_bias_in_16_bits(monkeypatch: pytest.MonkeyPatch, decay: float) -> None:
    for module in ("modules", "runtime"):
        monkeypatch.setattr(f"zotune.runtimes.embedded.{module}.product_dtype", lambda dtype, device: dtype)
    runtime = EmbeddedRuntime(tiny.model("opt").to(torch.bfloat16), Method(weight_decay=decay))
    layer = decoder_layers(runtime.model)[0].fc1
    key = DirectionKey(0, 0, 0)
    runtime.apply(Update(0, 0, ((key, 0.5),), 0.01, closes_window=False))
    runtime.score([Probe(key, 1, 0.01)], ROWS)
    runtime._shape.blocks = 1
    (matrix,) = layer.forward.matrix.members
    x = torch.randn(1, 200, layer.in_features).bfloat16()

    def double(factors: torch.Tensor) -> torch.Tensor:
        return factors.bfloat16().double()

    with torch.inference_mode():
        got = layer(x)
        moved = double(matrix.update) + 0.01 * double(matrix.shown.directions[0])
        bias = layer.bias.double() + matrix.bias.shift[0].double()
        kept = layer.weight.double() * (1 - 0.01 * decay)
        exact = x.double() @ (kept + moved @ double(matrix.v).T).T + bias
    best = (exact.bfloat16().double() - exact).abs().mean()
    assert (got.double() - exact).abs().mean() < 1.1 * best


@pytest.mark.usefixtures("everywhere_beside")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("decay", "steps"), [(100.0, 1), (99.0, 30), (60.0, 2)], ids=["nothing", "a trace", "a part"])
def test_factors_are_seen_whatever_decay_has_left_of_a_weight(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, decay: float, steps: int
) -> None:
    for module in ("modules", "runtime"):
        monkeypatch.setattr(f"zotune.runtimes.embedded.{module}.product_dtype", lambda dtype, device: dtype)
    method = Method(weight_decay=decay)
    runtimes = [EmbeddedRuntime(tiny.model("opt").to(dtype), method)]
    monkeypatch.setattr(appended, "pays", lambda dtype, device: False)
    runtimes.append(EmbeddedRuntime(tiny.model("opt").to(dtype), method))
    key = DirectionKey(0, steps, 0)
    for runtime in runtimes:
        for step in range(steps):
            runtime.apply(Update(step, 0, ((DirectionKey(0, step, 0), 0.5),), 0.01, closes_window=False))
    found, alone = (runtime.score([Probe(key, 1, 0.1)], ROWS) for runtime in runtimes)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    np.testing.assert_allclose(found, alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 2, 4])
def test_numbers_are_copied_wherever_they_lie(columns: int, dtype: torch.dtype) -> None:
    copies, pairs = appended._Copies(), []
    for start, width in itertools.product(range(3), (columns, columns + 1, 8)):
        flat = torch.zeros(20, dtype=dtype), torch.arange(20, dtype=dtype)
        to, given = (each[start:][: 2 * width].view(2, width)[:, :columns] for each in flat)
        pairs += [(to, given), (torch.zeros(2, 5, dtype=dtype)[:, start], given[:, 0])]
    for pair in pairs:
        copies.add(*pair)
    copies.copy()
    assert all(torch.equal(to, given) for to, given in pairs)
