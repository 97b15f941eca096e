"""The oracle is checked by hand, against autograd and against the procedures it stands for, never a runtime."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from zotune.errors import DataError, ModelError
from zotune.layout import Site
from zotune.optimizer import Method, Optimizer
from zotune.rows import Candidate, Example, Row
from zotune.testing import oracle, tiny
from zotune.testing.baselines.official import OfficialLozo, OfficialMezo, collate, padded_loss
from zotune.testing.oracle import DenseOracle
from zotune.testing.reference import OracleRuntime

torch.set_num_threads(1)


def bigram(family: str = "llama") -> nn.Module:
    """A model whose blocks add nothing, so that the next token depends on the last one in a way done by hand."""
    model = tiny.model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    return model


@torch.no_grad()
def by_hand(model: nn.Module, last: int, token: int) -> float:
    """Log-probability of ``token`` after ``last`` in a bigram Llama: RMS norm, gain, head, softmax."""
    hidden = model.model.embed_tokens.weight[last].double()
    hidden = hidden / math.sqrt(float(hidden.square().mean()) + model.config.rms_norm_eps)
    logits = model.lm_head.weight.double() @ (hidden * model.model.norm.weight.double())
    return float(logits[token] - logits.exp().sum().log())


def test_scores_a_bigram_model_as_by_hand() -> None:
    model = bigram()
    row = Row((5, 9), (Candidate((7,), (0,)), Candidate((8, 30, 4), (0, 2))))
    scores = DenseOracle(model, ()).score([row])
    assert scores.dtype == np.float32
    expected = [by_hand(model, 9, 7), by_hand(model, 9, 8) + by_hand(model, 30, 4)]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_perturbs_and_updates_a_gain_as_by_hand() -> None:
    model = bigram()
    gain = Site("model.norm.weight", (32,), decays=False)
    dense = DenseOracle(model, [gain])
    row, direction = Row((9,), (Candidate((7,), (0,)),)), torch.linspace(-1, 1, 32)
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted.model.norm.weight.add_(direction, alpha=0.1)
    before = dense.score([row])
    np.testing.assert_allclose(dense.score([row], [direction], 0.1), [by_hand(shifted, 9, 7)], rtol=1e-5)
    assert np.array_equal(dense.score([row]), before)
    dense.update([direction], -0.1, decay=0.5)
    np.testing.assert_allclose(dense.score([row]), [by_hand(shifted, 9, 7)], rtol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_differences_agree_with_autograd(family: str) -> None:
    model = tiny.model(family)
    sites = oracle.sites(model, "all")
    row = tiny.rows("multi", 1, seed=3)[0]
    dense = DenseOracle(model, sites)
    direction = [torch.randn(site.shape, generator=torch.Generator().manual_seed(1)) for site in sites]
    total = 0.0
    for candidate in row.candidates:
        tokens = torch.tensor([*row.prompt, *candidate.tokens])
        log_probabilities = model(tokens[None], use_cache=False).logits[0].log_softmax(-1)
        for index in candidate.scored:
            total = total + log_probabilities[len(row.prompt) + index - 1, candidate.tokens[index]]
    total.backward()
    slope = 0.0
    for site, change in zip(sites, direction, strict=True):
        gradient = model.get_parameter(site.name).grad
        turned = family == "gpt2" and site.is_matrix and ".h." in site.name
        slope += float(((gradient.T if turned else gradient) * change).sum())
    eps = 3e-4
    difference = (dense.score([row], direction, eps).sum() - dense.score([row], direction, -eps).sum()) / (2 * eps)
    assert difference == pytest.approx(slope, rel=0.01, abs=0.05)


@torch.no_grad()
def test_square_transposed_weights_are_turned() -> None:
    model = tiny.model("gpt2")
    site = Site("transformer.h.0.attn.c_proj.weight", (32, 32))
    direction = torch.zeros(32, 32)
    direction[3, 5] = 1.0
    dense = DenseOracle(model, [site])
    dense.update([direction], -1.0)
    moved = dense.model.transformer.h[0].attn.c_proj.weight - model.transformer.h[0].attn.c_proj.weight
    assert moved[5, 3] == pytest.approx(1.0, abs=1e-6)
    assert int(moved.count_nonzero()) == 1


def test_a_tied_weight_moves_in_both_places() -> None:
    model = tiny.model("llama-tied")
    names = [site.name for site in oracle.sites(model, "all")]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    dense = DenseOracle(model, [Site("model.embed_tokens.weight", (96, 32))])
    dense.update([torch.ones(96, 32)], -1.0)
    assert torch.equal(dense.model.lm_head.weight, dense.model.model.embed_tokens.weight)
    assert torch.equal(dense.model.lm_head.weight, model.lm_head.weight + 1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_scopes(family: str) -> None:
    model = tiny.model(family)
    everything = oracle.sites(model, "all")
    linear = oracle.sites(model, "linear")
    assert sum(site.size for site in everything) == sum(p.numel() for p in model.parameters())
    assert all(site.is_matrix and "embed" not in site.name and "wpe" not in site.name for site in linear)
    late = oracle.sites(model, "last-layers")
    assert {site.turn for site in late} == {(0, 2), (1, 2)}
    assert all((".1." in site.name) == (site.turn == (0, 2)) for site in late)
    assert all(".0." in site.name for site in late if site.turn == (1, 2))
    assert len(linear) == {"opt": 12, "gpt2": 8}.get(family, 14)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("model.nowhere.weight", (1, 1)), "not a parameter"),
        (Site("model.norm.weight", (31,)), "shape"),
        (Site("lm_head.weight", (96, 32)), "tied"),
    ],
)
def test_refuses_sites_that_the_model_lacks(site: Site, message: str) -> None:
    sites = [Site("model.embed_tokens.weight", (96, 32)), site]
    with pytest.raises(ModelError, match=message):
        DenseOracle(tiny.model("llama-tied"), sites)


def test_momentum_is_projected_into_the_next_window() -> None:
    method = Method(momentum=0.9, interval=1, rank=3, scope="linear", lr=0.5, normalised=True)
    runtime = OracleRuntime(tiny.model("llama"), method)
    before = runtime.state()
    optimizer = Optimizer(method, 10)
    updates = [optimizer.update(step, [2.0]) for step in range(2)]
    for update in updates:
        runtime.apply(update)
    name = runtime.layout.sites[0].name
    first, second = (runtime.directions.factors.views(runtime.directions.draw(u.terms[0][0]))[0] for u in updates)
    old, new = (runtime.directions.window(index)[0] for index in range(2))
    average = 0.1 * 2.0 * first
    expected = before[name] - 0.5 * average @ old.T
    average = 0.9 * average @ (old.T * 3**0.5 @ new * 3**0.5) / len(new) + 0.1 * 2.0 * second
    expected = expected - 0.5 * average @ new.T
    torch.testing.assert_close(runtime.state()[name], expected, rtol=1e-4, atol=1e-5)


def test_decay_spares_vectors() -> None:
    method = Method(weight_decay=0.1, lr=1.0)
    runtime = OracleRuntime(tiny.model("opt"), method)
    before = runtime.state()
    runtime.apply(Optimizer(method, 10).update(0, [0.0]))
    after = runtime.state()
    for site in runtime.layout.sites:
        torch.testing.assert_close(after[site.name], before[site.name] * (0.9 if site.is_matrix else 1.0))


def test_collate_pads_on_the_left_to_eight() -> None:
    row = Row((5, 6, 7, 8, 9, 10, 11), (Candidate((4, 9), (1,)), Candidate((20,), (0,))))
    batch = collate([Example(row, 1)], pad=1)
    assert batch.input_ids.shape == (2, 16)
    assert batch.input_ids[0].tolist() == [1] * 7 + [5, 6, 7, 8, 9, 10, 11, 4, 9]
    assert batch.attention_mask[1].tolist() == [0] * 8 + [1] * 8
    assert batch.scored == ((15,), (15,))
    assert (batch.sizes, batch.gold) == ((2,), (1,))


@pytest.mark.parametrize("counts", [(), (1, 2)])
def test_collate_refuses_examples_of_two_kinds(counts: tuple[int, ...]) -> None:
    batch = [Example(Row((5,), (Candidate((4, 9), (0, 1)),) * count)) for count in counts]
    with pytest.raises(DataError, match="two candidates or more, or with one each"):
        collate(batch)


# GPT-2 numbers positions from the padding on, as it does under any padding collator without position ids.
@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family != "gpt2"])
def test_padded_loss_is_the_loss_of_unpadded_scores(family: str) -> None:
    model = tiny.model(family)
    rows = [
        Row(
            tuple(range(5, 5 + length)), (Candidate((4, 9, 6), (0, 2)), Candidate((20,), (0,)), Candidate((7, 8), (1,)))
        )
        for length in (3, 17)
    ]
    scores = DenseOracle(model, ()).score(rows).reshape(2, 3) / [2, 1, 1]
    expected = [math.log(np.exp(row).sum()) - row[gold] for row, gold in zip(scores, (1, 2), strict=True)]
    with torch.no_grad():
        loss = padded_loss(model, collate([Example(rows[0], 1), Example(rows[1], 2)], pad=1))
    assert loss == pytest.approx(np.mean(expected), rel=1e-5)


def test_padded_loss_of_right_answers_alone() -> None:
    model = tiny.model("llama")
    rows = [Row((5, 6, 7), (Candidate((4, 9, 6), (0, 2)),)), Row((8, 9), (Candidate((20,), (0,)),))]
    scores = DenseOracle(model, ()).score(rows).reshape(2) / [2, 1]
    with torch.no_grad():
        loss = padded_loss(model, collate([Example(row) for row in rows]))
    assert loss == pytest.approx(-scores.mean(), rel=1e-5)


def written_out(model: nn.Module, batch: list[Example], seed: int, steps: int, corrected: bool) -> list[float]:
    """Official LOZO written out once more on the global random stream, with rank 2, interval 2, eps 1e-2, lr 1e-2."""
    seeds, kept, losses = np.random.default_rng(seed), {}, []
    padded = collate(batch)
    for step in range(steps):
        step_seed = int(seeds.integers(1_000_000_000))

        def direction(name: str, p: torch.Tensor, draw_v: bool) -> torch.Tensor:
            if p.dim() == 1:
                return torch.randn(p.shape)
            if draw_v:
                kept[name] = torch.randn(p.shape[1], 2)
            return torch.randn(p.shape[0], 2) @ kept[name].T

        def move(scale: float, draw_v: bool, step_seed: int = step_seed) -> None:
            torch.manual_seed(step_seed)
            for name, p in model.named_parameters():
                p.data += scale * direction(name, p, draw_v)

        refresh = step % 2 == 0
        move(1e-2, refresh)
        plus = padded_loss(model, padded)
        move(-2e-2, refresh)
        minus = padded_loss(model, padded)
        move(1e-2, refresh)
        move(-1e-2 * (plus - minus) / 2e-2, refresh and corrected)
        losses.append(plus)
    return losses


@pytest.mark.parametrize("corrected", [False, True])
@torch.no_grad()
def test_official_lozo_follows_the_official_stream(corrected: bool) -> None:
    mine, theirs, batch = tiny.model("opt"), tiny.model("opt"), tiny.examples(4)
    stepper = OfficialLozo(mine, lr=1e-2, eps=1e-2, rank=2, interval=2, seed=5, applies_probed=corrected)
    with torch.random.fork_rng():
        expected = written_out(theirs, batch, 5, 5, corrected)
    assert [stepper.step(batch) for _ in range(5)] == pytest.approx(expected, rel=1e-4)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=5e-4)


def test_the_official_order_applies_another_direction_on_refresh_steps_only() -> None:
    batch = tiny.examples(4)
    moved = {}
    for corrected in (False, True):
        model = tiny.model("llama")
        stepper = OfficialLozo(model, lr=1e-2, interval=2, applies_probed=corrected)
        states = [copy.deepcopy(model.state_dict())]
        for _ in range(2):
            # The same point before each step, so that only the step's own draws can differ.
            model.load_state_dict(states[0])
            stepper.step(batch)
            states.append(copy.deepcopy(model.state_dict()))
        moved[corrected] = [state["model.layers.0.mlp.up_proj.weight"] for state in states[1:]]
    assert not torch.allclose(moved[False][0], moved[True][0], atol=1e-3)
    torch.testing.assert_close(moved[False][1], moved[True][1])


def test_official_steps_leave_the_global_stream_alone() -> None:
    before = torch.random.get_rng_state()
    OfficialMezo(tiny.model("llama"), lr=1e-3).step(tiny.examples(4))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", [OfficialMezo, OfficialLozo])
def test_official_projected_gradient_agrees_with_autograd(kind: type[OfficialMezo]) -> None:
    model, batch = tiny.model("qwen2"), tiny.examples(4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"applies_probed": True} if kind is OfficialLozo else {}
    stepper = kind(model, lr=1.0, eps=2e-4, **options)
    gradients = _gradients(copy.deepcopy(model), batch)
    stepper.step(batch)
    # With lr 1 the weights moved by -c times the direction, so <gradient, move> must be -c * c.
    slope = sum(float((gradients[name] * (p.detach() - before[name])).sum()) for name, p in model.named_parameters())
    assert slope == pytest.approx(-(stepper.projected_gradient**2), rel=0.05)


def _gradients(model: nn.Module, batch: list[Example]) -> dict[str, torch.Tensor]:
    total = 0.0
    for example in batch:
        logits = model(torch.tensor([example.row.prompt]), use_cache=False).logits[0, -1]
        candidates = torch.stack([logits[candidate.tokens[0]] for candidate in example.row.candidates])
        total = total - candidates.log_softmax(0)[example.gold] / len(batch)
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_official_weight_decay_skips_its_names() -> None:
    model, batch = tiny.model("opt"), tiny.examples(4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # The limit of a vanishing projected gradient: only the decay is left to move anything.
    same = [replace(e, row=Row(e.row.prompt, (e.row.candidates[0],) * 2)) for e in batch]
    OfficialMezo(model, lr=0.1, weight_decay=0.5).step(same)
    for name, parameter in model.named_parameters():
        decays = not ("bias" in name or "layer_norm" in name)
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if decays else 1.0), rtol=0, atol=1e-4)


def test_official_steps_keep_the_dtype() -> None:
    model = tiny.model("llama", torch.bfloat16)
    loss = OfficialLozo(model, lr=1e-3).step(tiny.examples(4))
    assert math.isfinite(loss)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
