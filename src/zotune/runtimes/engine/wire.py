"""What travels between driver and worker, as plain lists, numbers and bytes that any transport carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.config import RuntimeConfig
from zotune.layout import Layout, Site
from zotune.optimizer import Method
from zotune.protocol import DirectionKey, Probe, Update
from zotune.rows import Candidate, Row
from zotune.runtimes.engine import lifeline
from zotune.runtimes.engine.tokenwise import Part

Plain = list[Any]


def settings(method: Method, layout: Layout, seed: int, options: RuntimeConfig) -> dict[str, Any]:
    """What a worker must know when it starts."""
    sites = [[site.name, list(site.shape), site.decays] for site in layout.sites]
    return {
        "method": asdict(method),
        "sites": sites,
        "seed": seed,
        "fold": options.fold,
        "bank_rank": options.vllm.bank_rank,
        "adapters": options.vllm.adapters,
        "driver": lifeline.driver(),
    }


def site(plain: Sequence[Any]) -> Site:
    """A site of `settings`."""
    name, shape, decays = plain
    return Site(name, tuple(shape), decays)


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
    name = str(plain.dtype).removeprefix("torch.")
    return [name, list(plain.shape), plain.flatten().view(torch.uint8).numpy().tobytes()]


def tensor(plain: Sequence[Any]) -> Tensor:
    """Back from `pack_tensor`."""
    name, shape, data = plain
    raw = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
    return raw.view(getattr(torch, name)).view(shape)


def pack_part(part: Part) -> Plain:
    """Which rows and columns of a whole site a part is: ``[row indices or [start, stop], [start, stop]]``."""
    rows, columns = part.rows, part.columns
    bounds = [rows.start, rows.stop] if isinstance(rows, slice) else ["indices", *rows.tolist()]
    return [bounds, [columns.start, columns.stop]]


def shard(whole: Tensor, place: Sequence[Any]) -> Tensor:
    """What of a whole site's tensor lies at a place that `pack_part` gave."""
    bounds, columns = place
    rows = whole[torch.tensor(bounds[1:])] if bounds[0] == "indices" else whole[slice(*bounds)]
    return rows[:, slice(*columns)] if rows.dim() == 2 else rows


def place(whole: Tensor, place: Sequence[Any], piece: Tensor) -> None:
    """Put a shard where it belongs in the whole."""
    bounds, columns = place
    rows = torch.tensor(bounds[1:]) if bounds[0] == "indices" else torch.arange(len(whole))[slice(*bounds)]
    if whole.dim() == 2:
        whole[rows, slice(*columns)] = piece
    else:
        whole[rows] = piece
