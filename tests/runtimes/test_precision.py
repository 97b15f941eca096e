import pytest
import torch

from zotune.runtimes.precision import product_dtype


@pytest.mark.parametrize(
    ("dtype", "capabilities", "expected"),
    [
        (torch.bfloat16, {"avx512_bf16": True}, torch.bfloat16),
        (torch.bfloat16, {"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        (torch.bfloat16, {"avx512_fp16": True, "avx512_bf16": False}, torch.float32),
        (torch.bfloat16, {}, torch.float32),
        (torch.float16, {"avx512_fp16": True}, torch.float16),
        (torch.float16, {"avx512_bf16": True}, torch.float32),
        (torch.float32, {}, torch.float32),
        (torch.float64, {"avx512_bf16": True}, torch.float64),
    ],
)
def test_sixteen_bits_are_widened_where_the_processor_cannot_multiply_them(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    product_dtype.cache_clear()
    try:
        assert product_dtype(dtype, "cpu") == expected
        assert product_dtype(dtype, "cuda") == dtype
    finally:
        product_dtype.cache_clear()
