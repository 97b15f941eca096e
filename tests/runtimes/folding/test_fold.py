from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from zotune.layout import Site
from zotune.noise import NoiseBlock
from zotune.optimizer import Method, Optimizer
from zotune.runtimes.folding.fold import Fold, MasterFold, StochasticFold
from zotune.runtimes.folding.move import LowRankChange, Move
from zotune.runtimes.folding.rounding import stochastic_round
from zotune.runtimes.spaces.dense import DenseSpace
from zotune.runtimes.spaces.lowrank import LowRankSpace
from zotune.testing import oracle

HALVES = [torch.bfloat16, torch.float16]
EVERY_BIT = torch.arange(65536, dtype=torch.int32)


def numbers(dtype: torch.dtype) -> Tensor:
    """Every finite number of a 16-bit format."""
    values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


def order(x: Tensor) -> Tensor:
    """Places of 16-bit numbers among all of their format, ascending; both zeros have the same."""
    bits = x.view(torch.int16).to(torch.int32)
    return torch.where(bits >= 0, bits, -(bits & 0x7FFF))


def between(dtype: torch.dtype, count: int) -> Tensor:
    """Float32 values of either sign between numbers of the format, small and large; below its smallest ones too."""
    generator = torch.Generator().manual_seed(0)
    lowest = -27 if dtype == torch.float16 else -40
    exponents = torch.empty(count).uniform_(lowest, 15, generator=generator)
    return torch.exp2(exponents) * (torch.randint(0, 2, (count,), generator=generator) * 2 - 1)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_number_of_the_format_stays_whatever_the_bits(dtype: torch.dtype) -> None:
    exact = numbers(dtype)
    for bits in (0, 1, 32767, 32768, 65534, 65535):
        rounded = stochastic_round(exact.float(), dtype, torch.full(exact.shape, bits, dtype=torch.int32))
        assert rounded.dtype == dtype
        assert torch.equal(rounded, exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_goes_to_a_neighbour_and_its_mean_is_the_value(dtype: torch.dtype) -> None:
    """The mean is over all bits that there are, so nothing is left to chance."""
    values = between(dtype, 100)
    assert (values < 0).any()
    assert dtype != torch.float16 or (values.abs() < 2.0**-14).sum() > 10
    for value in values:
        rounded = stochastic_round(value.expand(65536).contiguous(), dtype, EVERY_BIT)
        below, above = rounded.min(), rounded.max()
        assert below.float() < value < above.float()
        assert order(above) - order(below) == 1
        step = above.double() - below.double()
        assert abs(rounded.double().mean() - value) <= step / 65536


def test_a_change_of_low_rank_is_multiplied_out_for_the_rows_that_are_asked_for() -> None:
    left, right = torch.randn(7, 2), torch.randn(5, 2)
    torch.testing.assert_close(LowRankChange(left, right)(slice(2, 5)), (left @ right.T)[2:5])


@pytest.mark.parametrize("dtype", HALVES)
def test_the_key_decides_how_it_rounds(dtype: torch.dtype) -> None:
    site, start, change = Site("w", (40, 30)), torch.ones(40, 30, dtype=dtype), torch.full((40, 30), 1e-4)

    def folded(seed: int = 0, step: int = 9, name: str = "w", weight: Tensor = start) -> Tensor:
        weight = weight.clone(memory_format=torch.preserve_format)
        StochasticFold(seed).add(Move(Site(name, site.shape), weight, change.__getitem__), step)
        return weight

    assert torch.equal(folded(), folded())
    # However a checkpoint stores the weight.
    assert torch.equal(folded(), folded(weight=start.T.contiguous().T))
    for other in (folded(seed=1), folded(step=10), folded(name="v")):
        assert not torch.equal(other, folded())


@pytest.mark.parametrize("make", [lambda weight: StochasticFold(0), lambda weight: MasterFold({"w": weight})])
def test_a_large_float32_weight_is_kept_and_changed_row_by_row(make: Callable[[Tensor], Fold]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, change = torch.randn(5, 600_000, generator=generator), torch.randn(5, 600_000, generator=generator)
    expected, seen = weight * 0.9 + change, []

    def some(rows: slice) -> Tensor:
        seen.extend(range(5)[rows])
        assert (rows.stop - rows.start) * 600_000 <= 1 << 20, "the float32 temporaries are not bounded"
        return change[rows]

    make(weight).add(Move(Site("w", (5, 600_000)), weight, some, 0.9), 0)
    assert seen == [0, 1, 2, 3, 4]
    torch.testing.assert_close(weight, expected)


def test_a_large_weight_rounds_every_chunk_with_its_own_noise() -> None:
    weight = torch.ones(4, 1 << 19, dtype=torch.bfloat16)
    change = torch.full(weight.shape, 1 / 256)
    StochasticFold(0).add(Move(Site("w", (4, 1 << 19)), weight, change.__getitem__), 0)
    up = weight > 1
    assert (up.float().mean(1) - 0.5).abs().max() < 0.005
    agree = torch.stack([(up[a] == up[b]).float().mean() for a in range(4) for b in range(a)])
    assert (agree - 0.5).abs().max() < 0.005


def test_the_master_copy_comes_back_from_its_state() -> None:
    weight = torch.ones(3, dtype=torch.bfloat16)
    fold, change = MasterFold({"w": weight}), torch.full((3,), 2.0**-10)
    fold.add(Move(Site("w", (3,)), weight, change.__getitem__), 0)
    assert torch.equal(weight, torch.ones(3, dtype=torch.bfloat16))
    fresh = MasterFold({"w": weight})
    fresh.load_state({name: tensor.clone() for name, tensor in fold.state().items()})
    for step in range(1, 8):
        fresh.add(Move(Site("w", (3,)), weight, change.__getitem__), step)
    assert torch.equal(weight, torch.full((3,), 1 + 2.0**-7, dtype=torch.bfloat16))
    assert StochasticFold(0).state() == {}


SITE = Site("w", (128, 128))
STEPS = 2000
HALF_AN_ULP = 2.0**-7
"""Of bf16 weights between 2 and 4."""


def small_updates(method: Method) -> Iterator[tuple[Tensor, object]]:
    """Directions and updates of steps that climb the mean of the weights, each entry below half an ulp."""
    optimizer, directions = Optimizer(method, STEPS), oracle.directions([SITE], method)
    for step in range(STEPS):
        (key, _), *_ = optimizer.update(step, [1.0]).terms
        (direction,) = directions.dense(key)
        sign = -1.0 if direction.mean() > 0 else 1.0
        yield -method.lr * sign * direction, optimizer.update(step, [sign])


@pytest.mark.parametrize("fold", ["stochastic", "master"])
@pytest.mark.parametrize(
    "method",
    [
        Method(distribution="rademacher", rank=2, interval=50, lr=0.49 * HALF_AN_ULP),
        Method(family="dense", distribution="rademacher", lr=0.98 * HALF_AN_ULP),
    ],
    ids=["low-rank", "dense"],
)
def test_updates_below_half_an_ulp_survive(method: Method, fold: str) -> None:
    start = 3 + torch.rand(SITE.shape, generator=torch.Generator().manual_seed(0)).sub_(0.5).mul_(0.1)
    weight, plain = start.bfloat16(), start.bfloat16()
    before, exact = weight.double(), torch.zeros(SITE.shape, dtype=torch.float64)
    make = LowRankSpace if method.family == "low-rank" else DenseSpace
    space = make([SITE], method, 0, torch.device("cpu"))
    rounding: Fold = StochasticFold(0) if fold == "stochastic" else MasterFold({"w": weight})
    for change, update in small_updates(method):
        assert change.abs().max() < HALF_AN_ULP
        exact += change
        plain += change.bfloat16()
        space.apply(update, {SITE: weight}, rounding)  # type: ignore[arg-type]
    moved = weight.double() - before
    assert float(moved.mean() / exact.mean()) == pytest.approx(1, abs=0.02)
    assert float((moved * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.02)
    # The same updates, each rounded to nearest, leave every weight where it was.
    assert torch.equal(plain.double(), before)


def test_the_bits_that_round_are_those_of_the_key() -> None:
    weight = torch.ones(6, 7, dtype=torch.bfloat16)
    change = torch.linspace(0, 1 / 64, 42).view(6, 7)
    StochasticFold(3).add(Move(Site("w", (6, 7)), weight, change.__getitem__, 0.5), 12)
    block = NoiseBlock(["w[0]"], [(6, 7)], "bits16")
    bits = block.views(block.draw("fold/3/12"))[0]
    assert torch.equal(weight, stochastic_round(0.5 + change, torch.bfloat16, bits))
