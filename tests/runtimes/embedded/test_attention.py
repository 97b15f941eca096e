"""Packed attention against a softmax over an explicit mask, in float64."""

from typing import Any

import pytest
import torch
from packed import contexts
from torch import Tensor, nn

from zotune.errors import ModelError
from zotune.rows import Candidate, Row
from zotune.runtimes.embedded import attention
from zotune.runtimes.embedded.attention import attending, packed_attention
from zotune.runtimes.packing import Pack, pack
from zotune.testing import tiny

BLOCKS, WIDTH = 3, 8


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Pack,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``(1, heads, BLOCKS * T, width)`` to ``(1, BLOCKS * T, heads, width)``, over all pairs of tokens."""
    repeats, n = query.shape[1] // key.shape[1], len(packed.tokens)
    q, k, v = query.double()[0], *(x.double()[0].repeat_interleave(repeats, 0) for x in (key, value))
    seen = torch.zeros(n, n, dtype=torch.bool)
    for token, visible in enumerate(contexts(packed)):
        seen[token, visible if sliding_window is None else visible[-sliding_window:]] = True
    mask = torch.block_diag(*[seen.int()] * BLOCKS).bool()
    scores = q @ k.mT * (WIDTH**-0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1)[None]


def tensors(packed: Pack, heads: int, key_heads: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    n = BLOCKS * len(packed.tokens)
    # Tokens outermost in memory, as projections write them.
    made = [torch.randn(1, n, h, WIDTH, generator=generator) * 2 for h in (heads, key_heads, key_heads)]
    return [x.to(dtype).transpose(1, 2) for x in made]


def attend(packed: Pack, q: Tensor, k: Tensor, v: Tensor, **options: float | None) -> Tensor:
    with attending(packed):
        output, weights = packed_attention(nn.Identity(), q, k, v, None, **options)  # type: ignore[arg-type]
    assert weights is None
    return output


def row(prompt: int, *branches: int) -> Row:
    """A row with a prompt and candidates of these many tokens."""
    return Row((5,) * prompt, tuple(Candidate((6,) * length, (0,)) for length in branches))


PACKS = {
    "prompts": pack(tiny.rows("single", 6, seed=1, longest=9), normalised=True),
    "branches": pack(tiny.rows("multi", 6, seed=2, longest=9), normalised=True),
    "one token": pack([row(1, 1)], normalised=True),
    "one-token branches": pack([row(2, 2, 2)], normalised=True),
    "full groups": pack([row(16, 17), row(16, 17)], normalised=True),
    "long": pack([row(70, 9), row(80, 1), row(80, 1), row(60, 3, 2), row(3, 66)], normalised=True),
}


def test_the_packs_hold_what_is_to_be_tested() -> None:
    groups = [group for packed in PACKS.values() for group in packed.groups]
    for is_branches in (False, True):
        of_kind = [group for group in groups if (group.keys.shape != group.queries.shape) == is_branches]
        assert {group.keys.shape[1] > attention._SHORT for group in of_kind} == {True, False}
        assert {len(group.real) < group.queries.numel() for group in of_kind} == {True, False}
        assert {len(group.queries) == 1 for group in of_kind} == {True, False}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling": 0.2},
        {"sliding_window": 3},
        {"sliding_window": 1},
        {"sliding_window": 9},
        {"sliding_window": 100},
        {"softcap": 1.5},
        {"softcap": 1.5, "sliding_window": 4, "scaling": 0.4},
    ],
    ids=str,
)
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("packed", PACKS.values(), ids=PACKS.keys())
def test_every_token_sees_its_row_and_nothing_else(
    packed: Pack, heads: int, key_heads: int, options: dict[str, float]
) -> None:
    q, k, v = tensors(packed, heads, key_heads)
    output = attend(packed, q, k, v, **options)
    expected = naive(q, k, v, packed, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"softcap": 1.5}], ids=str)
def test_sixteen_bits_are_as_good_as_they_can_be(options: dict[str, float]) -> None:
    q, k, v = tensors(PACKS["branches"], 4, 2, torch.bfloat16)
    output = attend(PACKS["branches"], q, k, v, **options)
    assert output.dtype == torch.bfloat16
    expected = naive(q, k, v, PACKS["branches"], **options)  # type: ignore[arg-type]
    torch.testing.assert_close(output.double(), expected, rtol=0.03, atol=0.06)


def test_values_may_have_another_width_than_keys() -> None:
    q, k, v = tensors(PACKS["branches"], 4, 2)
    output = attend(PACKS["branches"], q, k, v[..., :5])
    torch.testing.assert_close(output, attend(PACKS["branches"], q, k, v)[..., :5])


def test_attention_sinks_are_refused() -> None:
    q, k, v = tensors(PACKS["prompts"], 4, 4)
    with attending(PACKS["prompts"]), pytest.raises(ModelError, match="attention sinks are not supported"):
        packed_attention(nn.Identity(), q, k, v, None, s_aux=torch.zeros(4))


def test_the_pack_in_force_is_the_innermost() -> None:
    q, k, v = tensors(PACKS["prompts"], 4, 4)
    alone = attend(PACKS["prompts"], q, k, v)
    with attending(PACKS["prompts"]):
        attend(PACKS["branches"], *tensors(PACKS["branches"], 4, 4))
        output, _ = packed_attention(nn.Identity(), q, k, v, None)
    assert torch.equal(output, alone)


def looped(
    query: Tensor, key: Tensor, value: Tensor, begins: Tensor, keys_begin: Tensor, *longest: int, **options: Any
) -> Tensor:
    """What FlashAttention gives, one sequence after the other: its masks are aligned to the last query and key."""
    out = torch.empty(*query.shape[:2], value.shape[2])
    assert options["is_causal"]
    left = options["window_size_left"]
    repeats = query.shape[1] // key.shape[1]
    for s, e, ks, ke in zip(begins[:-1], begins[1:], keys_begin[:-1], keys_begin[1:], strict=True):
        q, k, v = (x.transpose(0, 1) for x in (query[s:e], key[ks:ke], value[ks:ke]))
        assert (q.shape[1] <= longest[0], k.shape[1] <= longest[1]) == (True, True)
        at, seen = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None], torch.arange(k.shape[1])
        mask = (seen <= at) if left is None else (seen <= at) & (seen >= at - left)
        scale = WIDTH**-0.5 if options["scale"] is None else options["scale"]
        scores = (q @ k.repeat_interleave(repeats, 0).mT * scale).masked_fill(~mask, -torch.inf)
        out[s:e] = (scores.softmax(-1) @ v.repeat_interleave(repeats, 0)).transpose(0, 1)
    return out


@pytest.mark.parametrize("options", [{}, {"scaling": 0.2}, {"sliding_window": 3}, {"sliding_window": 100}], ids=str)
@pytest.mark.parametrize("kind", ["single", "multi", "mixed"])
def test_spans_say_what_groups_say(kind: Any, options: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_kernel", looped)
    rows = tiny.rows(kind, 6, seed=3, longest=19)
    groups, spans = (pack(rows, normalised=True, spans=which) for which in (False, True))
    assert (spans.groups, groups.spans) == ((), None)
    q, k, v = tensors(groups, 4, 2)
    torch.testing.assert_close(attend(spans, q, k, v, **options), attend(groups, q, k, v, **options))


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_cpu_takes_groups(family: str) -> None:
    assert not attention.takes_spans(tiny.model(family, torch.bfloat16))  # type: ignore[arg-type]
