"""What runs in a replica's process: an ordinary runtime that is told what to do by short messages.

A message brings the updates that the replica lacks and the rows that it has not seen, then asks for something. So a
replica is never told to keep up: whatever it is asked, it is up to date when it answers.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zotune.layout import Layout
from zotune.machine import versions
from zotune.rows import Row
from zotune.runtimes import precision, wire
from zotune.runtimes.base import Runtime
from zotune.runtimes.blueprint import Blueprint
from zotune.runtimes.replicas.history import update

PIECE = 16 * 2**20
"""Most bytes of a state that are under way at once, so that Ray's object store may be small."""


@dataclass(frozen=True)
class Introduction:
    """What a replica says of itself when it is ready.

    Attributes:
        layout: The sites.
        traits: What must be the same for all replicas, or their scores would differ, by name.
        pid: Its process.
    """

    layout: Layout
    traits: Mapping[str, str]
    pid: int


class Replica:
    """The class of Ray's actors."""

    def __init__(self) -> None:
        self._cores = sorted(os.sched_getaffinity(0))
        self._runtime: Runtime | None = None
        self._rows: dict[int, Row] = {}
        self._leaving: dict[str, Tensor] = {}
        self._coming: dict[str, Tensor] = {}

    def open(self, blueprint: Blueprint, cores: Sequence[int]) -> Introduction:
        """Build the runtime, in the place of one that there may be.

        Args:
            blueprint: Of what.
            cores: Places of the cores to run on among those that this process may use; none: on all.
        """
        os.sched_setaffinity(0, {self._cores[core % len(self._cores)] for core in cores} or self._cores)
        self.shut()
        self._rows.clear()
        model, _ = blueprint.load()
        self._runtime = blueprint.build(model)
        traits = {name: version or "none" for name, version in versions().items()}
        traits |= {
            "dtype": precision.name(model.dtype),
            "device": _device(blueprint),
            "threads": str(torch.get_num_threads()),
            "model": self._runtime.fingerprint,
            "layout": self._runtime.layout.fingerprint,
        }
        return Introduction(self._runtime.layout, traits, os.getpid())

    def call(self, message: bytes) -> bytes:
        """Take updates and rows, then do what is asked.

        Args:
            message: Updates, rows by number, name of a method ``on_...`` and its arguments, pickled.

        Returns:
            Seconds that it took and the answer, pickled.
        """
        began = time.perf_counter()
        updates, rows, method, arguments = pickle.loads(message)
        for packed in updates:
            self._live.apply(update(packed))
        self._rows |= {number: wire.row(plain) for number, plain in rows.items()}
        answer = getattr(self, f"on_{method}")(*arguments)
        return pickle.dumps((time.perf_counter() - began, answer), protocol=5)

    @property
    def _live(self) -> Runtime:
        assert self._runtime is not None
        return self._runtime

    def on_score(self, units: Sequence[tuple[Sequence[Any], Sequence[int]]], normalised: bool) -> list[bytes]:
        """Score units, each packed probes and row numbers: float32 ``(probes, candidates)`` of each."""
        answers = []
        for probes, numbers in units:
            rows = [self._rows[number] for number in numbers]
            answers.append(self._live.score([wire.probe(each) for each in probes], rows, normalised=normalised))
        return [answer.tobytes() for answer in answers]

    def on_generate(self, groups: Sequence[Sequence[tuple[int, ...]]], most: int, stop: frozenset[int]) -> list[Any]:
        """Write on from groups of prompts."""
        return [self._live.generate(prompts, max_new_tokens=most, stop=stop) for prompts in groups]

    def on_nothing(self) -> None:
        """Only keep up."""

    def on_fingerprint(self) -> str:
        """Hexadecimal SHA-256 of every bit of the state."""
        found = hashlib.sha256()
        for name, tensor in sorted(self._live.state().items()):
            found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            found.update(_bytes(tensor))
        return found.hexdigest()

    def on_state(self) -> list[tuple[str, str, list[int], int]]:
        """Make a copy of the state to be fetched by `piece`: name, dtype, shape and bytes of every tensor."""
        self._leaving = self._live.state()
        return [
            (name, precision.name(tensor.dtype), list(tensor.shape), tensor.nbytes)
            for name, tensor in self._leaving.items()
        ]

    def piece(self, name: str, start: int) -> bytes:
        """Bytes of a tensor of that copy."""
        return bytes(_bytes(self._leaving[name])[start : start + PIECE])

    def on_fetched(self) -> None:
        """Forget the copy."""
        self._leaving = {}

    def put(self, name: str, dtype: str, shape: Sequence[int], start: int, data: bytes) -> None:
        """Take bytes of a tensor of another state, which `loaded` makes use of."""
        if name not in self._coming:
            self._coming[name] = torch.empty(list(shape), dtype=getattr(torch, dtype))
        _bytes(self._coming[name])[start : start + len(data)] = data

    def loaded(self, window: int) -> None:
        """Restore the state that was put, as of ``window``."""
        state, self._coming = self._coming, {}
        self._live.load_state(state, window)

    def shut(self) -> None:
        """Let go of the runtime."""
        if self._runtime is not None:
            self._runtime.close()
        self._runtime = None


def _bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's memory."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def _device(blueprint: Blueprint) -> str:
    """The kind of device that the blueprint's runtime is on: what rounds alike."""
    if torch.cuda.is_available() and blueprint.model.device != "cpu":
        return torch.cuda.get_device_name()
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"
