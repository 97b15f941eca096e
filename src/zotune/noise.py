"""Noise as a pure function of a key: the same numbers on every device, thread count, runtime and shard.

Each tensor has its own counter-based generator, the one of Steele, Lea and Flood (2014, "Fast splittable pseudorandom
number generators"): word ``i`` is ``mix(start + i * gamma)`` in 64-bit integers, with ``start`` and the odd ``gamma``
hashed from the key and the tensor's name. A word is cut into lanes, and a lane is looked up or shifted, never put
through floating-point arithmetic, so the result is bit-identical wherever it is drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from zotune.transfer import onto

Distribution = Literal["normal", "rademacher", "bits16"]

_LANES: dict[Distribution, int] = {"normal": 4, "rademacher": 64, "bits16": 4}
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


@lru_cache(maxsize=4)
def normal_table(device: torch.device) -> Tensor:
    """The 65,536 quantile midpoints of the standard normal, float32 ``(65536,)``, scaled to variance one.

    Drawing one of them with equal probability has mean 0, variance 1 and a kurtosis of 2.999; the largest is 4.32.
    """
    half = [NormalDist().inv_cdf(0.5 + (i + 0.5) / 65536) for i in range(32768)]
    spread = math.sqrt(math.fsum(x * x for x in half) / 32768)
    positive = np.array([x / spread for x in half], dtype=np.float32)
    return torch.from_numpy(np.concatenate([positive, -positive[::-1]])).to(device)


class NoiseBlock:
    """Tensors that are always drawn together, as views of one flat buffer.

    Args:
        names: One name per tensor; tensors of equal shape and different names are independent.
        shapes: Their shapes.
        distribution: ``normal`` and ``rademacher`` give float32, ``bits16`` int32 in ``0 .. 65535``.
        device: Where to draw.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        distribution: Distribution = "normal",
        device: torch.device | str = "cpu",
    ) -> None:
        self.shapes = tuple(shapes)
        self.distribution = distribution
        self.device = torch.device(device)
        self._names = hashes(names)
        lanes = _LANES[distribution]
        words = torch.tensor([-(-math.prod(shape) // lanes) for shape in shapes], dtype=torch.int64)
        starts = words.cumsum(0) - words
        self._n_words = int(words.sum())
        self._offsets = [int(start) * lanes for start in starts]
        self.size = self._n_words * lanes
        self._tensor: Tensor | None = None
        if len(shapes) > 1:
            self._tensor = torch.repeat_interleave(torch.arange(len(shapes)), words).to(self.device, torch.int32)
            self._counter = (torch.arange(self._n_words) - starts.repeat_interleave(words)).to(self.device)

    def draw(self, key: str) -> Tensor:
        """One flat tensor ``(size,)`` for this key; `views` cuts it. Elements between two views are unused."""
        return self.drawn(onto(self.streams(key), self.device))

    def streams(self, key: str) -> Tensor:
        """What `drawn` makes the draw of this key from: int64 ``(2, tensors)`` on the CPU."""
        return streams(self._names, key)

    def drawn(self, given: Tensor) -> Tensor:
        """What `draw` gives for a key, in operations on the device alone; ``given`` is its `streams`, over there."""
        return _LOOKUPS[self.distribution](self._words(*given))

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors of a flat buffer ``(..., size)``, without a copy."""
        return [
            flat[..., offset : offset + math.prod(shape)].unflatten(-1, shape)
            for offset, shape in zip(self._offsets, self.shapes, strict=True)
        ]

    def _words(self, starts: Tensor, gammas: Tensor) -> Tensor:
        if self._tensor is None:
            # Counted anew, because a lone tensor may be as large as a weight, and a block of every weight is kept.
            counter = torch.arange(self._n_words, device=self.device)
        else:
            starts, gammas = (each.index_select(0, self._tensor) for each in (starts, gammas))
            counter = self._counter
        return _mix_(torch.addcmul(starts, gammas, counter))


def hashes(names: Sequence[str]) -> np.ndarray:
    """What `streams` takes of tensors' names, uint64."""
    return np.array([_hash(name)[0] for name in names], dtype=np.uint64)


def streams(names: np.ndarray, key: str) -> Tensor:
    """Start and gamma of each tensor's generator, int64 ``(2, names)`` on the CPU.

    Args:
        names: See `hashes`.
        key: Of the draw.
    """
    made = _mix(names ^ np.array(_hash(key), dtype=np.uint64)[:, None])
    made[1] |= np.uint64(1)
    return torch.from_numpy(made.view(np.int64))


def bits16_at(starts: Tensor, gammas: Tensor, at: Tensor) -> Tensor:
    """Elements of ``bits16`` tensors, wherever they are asked for, int32.

    Args:
        starts: Of each element's tensor, int64; see `streams`.
        gammas: The same.
        at: Places of the elements in their flattened tensors, int64.
    """
    # Shifts, because a compiler makes of a signed division what is several times slower.
    words = _mix_(starts + gammas * (at >> 2))
    return ((words >> ((at & 3) << 4)) & 0xFFFF).to(torch.int32)


def _hash(text: str) -> tuple[int, int]:
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on unsigned words, in place."""
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(multiplier)
    x ^= x >> np.uint64(_SHIFTS[-1])
    return x


def _mix_(x: Tensor) -> Tensor:
    """The same on signed words, in place; a mask makes the arithmetic shift logical."""
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(multiplier - (1 << 64))
    return x.bitwise_xor_((x >> _SHIFTS[-1]).bitwise_and_((1 << (64 - _SHIFTS[-1])) - 1))


def _bits16(words: Tensor) -> Tensor:
    return words.view(torch.uint16).to(torch.int32)


def _normal(words: Tensor) -> Tensor:
    return normal_table(words.device).index_select(0, _bits16(words))


def _rademacher(words: Tensor) -> Tensor:
    lanes = torch.arange(8, dtype=torch.uint8, device=words.device)
    bits = (words.view(torch.uint8).unsqueeze(1) >> lanes).bitwise_and_(1)
    return bits.flatten().to(torch.float32).mul_(2).sub_(1)


_LOOKUPS = {"normal": _normal, "rademacher": _rademacher, "bits16": _bits16}
