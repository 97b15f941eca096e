"""What tokens see of a module, against the sum over their own directions; no engine is needed."""

import pytest
import torch

from zotune.layout import Site
from zotune.runtimes.engine.tokens import Part, TokenMix, TunedVector
from zotune.runtimes.engine.tokenwise import TunedMatrix
from zotune.runtimes.spaces import skinny
from zotune.runtimes.spaces.lowrank import LowRankMatrix

CPU = torch.device("cpu")
SEEN = [(0, 0), (1, 1), (1, -1), (3, 1), (3, -1), (0, 0)]
"""The column and the sign that each token sees."""


def mixed(mix: TokenMix) -> torch.Tensor:
    """Let the first tokens see what `SEEN` says; their mixtures."""
    mix.show(torch.tensor([mix.number(column, sign) for column, sign in SEEN]))
    rows = torch.zeros(len(SEEN), 4)
    for row, (column, sign) in zip(rows, SEEN, strict=True):
        row[column] = sign
        row[0] = 1
    return rows


def test_every_mixture_has_a_number_of_its_own() -> None:
    mix = TokenMix(8, 3, torch.float32, CPU)
    rows = mixed(mix)
    assert torch.equal(mix.exact[: len(SEEN)], rows)
    assert len({mix.number(column, sign) for column in (1, 2, 3) for sign in (1, -1)} - {0}) == 6
    mix.clear(4)
    assert torch.equal(mix.exact[:4], torch.eye(4)[:1].expand(4, -1))
    assert torch.equal(mix.exact[4:6], rows[4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_adds_every_tokens_own_directions(dtype: torch.dtype) -> None:
    mix = TokenMix(8, 3, dtype, CPU)
    sites = Site("q", (6, 5)), Site("k", (4, 5))
    module = TunedMatrix(
        [Part(sites[0], slice(0, 6), slice(None)), Part(sites[1], slice(6, 10), slice(None))], (10, 5), 2, mix
    )
    rows = mixed(mix)
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(5, 4, generator=draw)
    module.phi.copy_(torch.randn(module.phi.shape, generator=draw))
    module.v.copy_(v.repeat(1, 4))
    x, y = torch.randn(len(SEEN), 5, generator=draw), torch.randn(len(SEEN), 10, generator=draw)
    expected = y + torch.einsum("ti,iw,tj,jwo->to", x, v, rows, module.phi.float().unflatten(0, (4, 4)))
    got = module.add_to(y.to(dtype), x.to(dtype)).float()
    torch.testing.assert_close(got, expected, **({} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.2}))


def test_a_vector_is_what_it_is_and_every_tokens_own_directions() -> None:
    mix = TokenMix(8, 3, torch.bfloat16, CPU)
    site = Site("gain", (7,))
    module = TunedVector([Part(site, slice(0, 7), slice(None))], 7, mix)
    rows, stored = mixed(mix), torch.randn(7)
    module.phi.copy_(torch.randn(4, 7))
    torch.testing.assert_close(module.seen(stored, len(SEEN)), stored + rows @ module.phi)


@pytest.mark.parametrize(("step", "factors"), [(1, 12), (8, 16)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_bias_is_a_row_of_its_matrix(step: int, factors: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows fill up what a GPU multiplies by."""
    monkeypatch.setattr(skinny, "_ALIGNED", {"cpu": step})
    mix = TokenMix(8, 3, torch.float32, CPU)
    weight, bias = Site("weight", (10, 5)), Site("bias", (10,))
    whole = slice(None)
    module = TunedMatrix([Part(weight, whole, whole)], (10, 5), 2, mix, [Part(bias, whole, whole)])
    assert module.v.shape == (5, factors)
    rows = mixed(mix)
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(5, 2, generator=draw)
    state = LowRankMatrix(torch.zeros(10, 2))
    state.open_window(v)
    module.open_window({weight: state})
    u, z = torch.randn(4, 10, 2, generator=draw), torch.randn(4, 10, generator=draw)
    for column in range(4):
        module.show(column, {weight: u[column], bias: z[column]})
    x, y = torch.randn(len(SEEN), 5, generator=draw), torch.randn(len(SEEN), 10, generator=draw)
    expected = y + torch.einsum("ti,iw,tj,jow->to", x, v, rows, u) + biased * (rows @ z)
    torch.testing.assert_close(module.add_to(y.clone(), x, biased), expected)
    assert torch.equal(module.vector(), z[0])
