"""The skinny product; that scores, updates and state are the oracle's is shown by `tests/test_conformance.py`."""

import pytest
import torch

from zotune.runtimes.spaces.lowrank import LowRankMatrix
from zotune.runtimes.spaces.skinny import SkinnyProduct, filled

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("device", "expected"), [("cuda", [0, 8, 8, 16]), ("cpu", [0, 3, 8, 9])])
def test_a_gpu_multiplies_by_eights_of_factors(device: str, expected: list[int]) -> None:
    assert [filled(factors, torch.device(device)) for factors in (0, 3, 8, 9)] == expected


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("keep", [1.0, 0.7, 0.0])
def test_what_is_large_is_rounded_once_in_16_bits(keep: float, biased: bool) -> None:
    torch.manual_seed(0)
    matrix = LowRankMatrix(torch.zeros(96, 2))
    product = SkinnyProduct([matrix])
    product.stage()
    matrix.open_window(torch.randn(32, 2))
    matrix.keep = keep
    product.factors = (0.01 * torch.randn(3, *product.shape)).bfloat16()
    x, weight = torch.randn(3, 50, 32).bfloat16(), torch.randn(96, 32).bfloat16()
    bias = 0.1 * torch.randn(96).bfloat16() if biased else None
    got = product.linear(x, weight, bias).double()
    exact = keep * x.double() @ weight.double().T + product.factors_of(x).double() @ product.factors.double()
    exact = exact if bias is None else exact + bias.double()
    best = (exact.bfloat16().double() - exact).abs().mean()
    assert (got - exact).abs().mean() < 1.1 * best
