"""What travels to the processes of a runtime, as plain lists, numbers and bytes that any transport carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.protocol import DirectionKey, Probe, Update
from zotune.rows import Candidate, Row
from zotune.runtimes import precision

Plain = list[Any]


def pack_probe(probe: Probe) -> Plain:
    """A probe as ``[key or None, sign, eps]``."""
    key = probe.key and [probe.key.window, probe.key.step, probe.key.index]
    return [key, probe.sign, probe.eps]


def probe(plain: Sequence[Any]) -> Probe:
    """Back from `pack_probe`."""
    key, sign, eps = plain
    return Probe(key and DirectionKey(*key), sign, eps)


def pack_update(update: Update) -> Plain:
    """An update as nested lists."""
    terms = [[[key.window, key.step, key.index], coefficient] for key, coefficient in update.terms]
    return [update.step, update.window, terms, update.lr, update.closes_window]


def update(plain: Sequence[Any]) -> Update:
    """Back from `pack_update`."""
    step, window, terms, lr, closes = plain
    return Update(step, window, tuple((DirectionKey(*key), value) for key, value in terms), lr, closes)


def pack_row(row: Row) -> Plain:
    """A row as nested lists of token ids."""
    return [list(row.prompt), [[list(each.tokens), list(each.scored)] for each in row.candidates]]


def row(plain: Sequence[Any]) -> Row:
    """Back from `pack_row`."""
    prompt, candidates = plain
    return Row(tuple(prompt), tuple(Candidate(tuple(tokens), tuple(scored)) for tokens, scored in candidates))


def pack_tensor(tensor: Tensor) -> Plain:
    """A tensor as ``[dtype, shape, bytes]``."""
    plain = tensor.detach().to("cpu").contiguous()
    name = precision.name(plain.dtype)
    return [name, list(plain.shape), plain.flatten().view(torch.uint8).numpy().tobytes()]


def tensor(plain: Sequence[Any]) -> Tensor:
    """Back from `pack_tensor`."""
    name, shape, data = plain
    raw = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
    return raw.view(getattr(torch, name)).view(shape)
