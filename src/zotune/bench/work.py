"""How much a step computes, and how fast this machine multiplies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from zotune.models import head_width
from zotune.rows import Example, Row

_PEAK_SHAPES = {
    "cpu": ((512, 1024, 4096), (1024, 1024, 1024), (1024, 2048, 2048), (2048, 2048, 2048)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192)),
}
_LAUNCHES = {"cpu": 1, "cuda": 10}
"""Products per measurement: on a GPU, waiting for one takes about as long as a small one does."""
_PEAK_SECONDS = 0.15


def step_tokens(rows: Sequence[Row], probes: int) -> int:
    """Tokens that a packed forward of these rows computes, all probes counted."""
    return probes * sum(row.n_tokens for row in rows)


def sequence_lengths(examples: Sequence[Example]) -> list[int]:
    """Tokens of every sequence where each candidate has one of its own."""
    return [len(e.row.prompt) + len(c.tokens) for e in examples for c in e.row.candidates]


def padded_tokens(examples: Sequence[Example]) -> int:
    """Tokens that the official procedure computes for a batch: two forwards of one padded sequence per candidate."""
    lengths = sequence_lengths(examples)
    return 2 * len(lengths) * (-(-max(lengths) // 8) * 8)


def step_flops(model: Any, rows: Sequence[Row], probes: int, *, normalised: bool) -> float:
    """Floating-point operations of the model in a packed forward, a multiplication and an addition counted as two.

    Args:
        model: A Hugging Face causal language model; its head counts only for the tokens and vocabulary that are scored.
        rows: The batch.
        probes: Parameter states that score it.
        normalised: Whether the whole vocabulary is scored.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    body = sum(layer.weight.numel() for layer in layers) * sum(row.n_tokens for row in rows)
    width = head_width(config)
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * width * sum(_pairs(row) for row in rows)
    vocabulary = config.vocab_size
    if not normalised and all(row.single_token for row in rows):
        vocabulary = len({token for row in rows for c in row.candidates for token in c.tokens})
    head_work = config.hidden_size * vocabulary * sum(_predicting(row) for row in rows)
    return 2.0 * probes * (body + attention + head_work)


def _pairs(row: Row) -> int:
    """Pairs of a query and a key that causal attention looks at."""
    n = len(row.prompt)
    branches = [len(candidate.tokens) - 1 for candidate in row.candidates]
    return n * (n + 1) // 2 + sum(b * n + b * (b + 1) // 2 for b in branches)


def _predicting(row: Row) -> int:
    """Tokens whose next token is scored; the prompt's last one is shared by all candidates."""
    inside = sum(index > 0 for candidate in row.candidates for index in candidate.scored)
    return inside + any(0 in candidate.scored for candidate in row.candidates)


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of the best of a few large matrix products."""
    return max(_rate(shape, dtype, device) for shape in _PEAK_SHAPES[device.type])


def _rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    m, k, n = shape
    x, weight = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (n, k)))
    launches = _LAUNCHES[device.type]
    best, until = float("inf"), time.perf_counter() + _PEAK_SECONDS
    while time.perf_counter() < until or best == float("inf"):
        start = clock(device)
        for _ in range(launches):
            nn.functional.linear(x, weight)
        best = min(best, (clock(device) - start) / launches)
    return 2.0 * m * k * n / best


def clock(device: torch.device) -> float:
    """Seconds, once all that was asked of the device, or of a GPU by an engine in this process, is done."""
    if device.type == "cuda" or torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
