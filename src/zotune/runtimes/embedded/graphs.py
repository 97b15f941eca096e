"""CUDA graphs: a forward that the host launches as one, instead of operation by operation.

A graph is captured for each shape of pack, the second time that it is seen, and replayed from then on. All graphs share
their memory, for one runs at a time and what it gives is read before the next. To have few shapes, packs are filled up
with tokens that nothing is read from.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune.rows import Row
from zotune.runtimes.packing import Pack
from zotune.transfer import Inbox, onto

Forward = Callable[[Pack, Tensor], Tensor]

_LARGEST = 8192
"""Tokens of all blocks up to which launching takes a part of a forward that is worth saving."""
_MOST = 64
"""Graphs that are kept."""
_FINEST, _COARSEST = 16, 128
"""Fewest and most tokens that lengths of packs are apart."""


def filler(tokens: int) -> Row:
    """A row that nothing is read from, with which so many tokens become one of few numbers; about 3 % of them."""
    step = min(_COARSEST, max(_FINEST, 1 << max(1, tokens // 16).bit_length() - 1))
    return Row((0,) * (step - tokens % step), ())


class Graphs:
    """Runs forwards of packs with spans, as graphs where that is possible and pays.

    Args:
        device: Where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, _Captured] = {}
        self._memory = torch.cuda.graph_pool_handle()
        self._able = True

    def run(self, forward: Forward, pack: Pack, given: Tensor, blocks: int, state: Hashable) -> Tensor:
        """What ``forward`` gives for a pack; to be read before the next call.

        Args:
            forward: Depends on nothing but the pack's tensors, what is given with it, tensors that stay where they are,
                and ``state``.
            pack: On the CPU.
            given: Another tensor of int64, on the CPU.
            blocks: That it is computed for.
            state: What else may make a difference to the operations of the forward.
        """
        parts = [given.view(-1), *pack.tensors()]
        assert pack.spans is not None
        key = (state, blocks, tuple(map(len, parts)), pack.vocabulary is None, pack.spans.longest)
        if key in self._captured:
            return self._captured[key](parts)
        # A first time by itself, because libraries set themselves up when they are first called.
        if key not in self._seen or not self._pays(pack, blocks):
            self._seen.add(key)
            return forward(pack.to(self._device), onto(given, self._device))
        try:
            self._captured[key] = _Captured(forward, pack, given, self._device, self._memory)
        except RuntimeError:
            # A model whose own code waits for the device cannot be captured.
            self._able = False
            return forward(pack.to(self._device), onto(given, self._device))
        return self._captured[key](parts)

    def _pays(self, pack: Pack, blocks: int) -> bool:
        return self._able and len(self._captured) < _MOST and blocks * len(pack.tokens) <= _LARGEST


class _Captured:
    """A forward that reads its pack, and what is given with it, from one place."""

    def __init__(self, forward: Forward, pack: Pack, given: Tensor, device: torch.device, memory: Any) -> None:
        # What is captured and replayed is a stream of the current device, which need not be the model's.
        self._current = partial(torch.cuda.device, device)
        flat = pack.flat()
        self._inbox, self._graph = Inbox(given.numel() + len(flat), device), torch.cuda.CUDAGraph()
        self._inbox.write([given.view(-1), flat])
        given_there, pack_there = self._inbox.there.split([given.numel(), len(flat)])
        with self._current(), torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
            self._scores = forward(pack.over(pack_there), given_there.view(given.shape))

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        self._inbox.write(parts)
        with self._current():
            self._graph.replay()
        return self._scores
