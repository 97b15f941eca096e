import pytest
import torch

from zotune.runtimes.spaces.skinny import filled


@pytest.mark.parametrize(("device", "expected"), [("cuda", [0, 8, 8, 16]), ("cpu", [0, 3, 8, 9])])
def test_a_gpu_multiplies_by_eights_of_factors(device: str, expected: list[int]) -> None:
    assert [filled(factors, torch.device(device)) for factors in (0, 3, 8, 9)] == expected
