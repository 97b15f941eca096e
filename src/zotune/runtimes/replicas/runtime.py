"""The driver's side of the Ray runtime: it holds no tensors, and what it asks does not depend on who answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from zotune.protocol import Probe, Update
from zotune.rows import Row
from zotune.runtimes import embedded, wire
from zotune.runtimes.blueprint import Blueprint
from zotune.runtimes.engine.bank import settled
from zotune.runtimes.replicas import units
from zotune.runtimes.replicas.board import Board
from zotune.runtimes.replicas.cluster import Cluster
from zotune.runtimes.replicas.history import History
from zotune.runtimes.replicas.member import Member, Traffic
from zotune.runtimes.replicas.replica import Introduction
from zotune.runtimes.replicas.spread import Begin, Part, Spread
from zotune.runtimes.replicas.team import Team
from zotune.runtimes.replicas.units import Unit

_CPU_UNIT, _GPU_UNIT = 1024, 8192
"""Tokens from which a forward is about as efficient as a larger one."""

_PROMPTS = 8
"""Prompts that one replica writes on from together."""


class RayRuntime:
    """Implements `zotune.runtimes.base.Runtime` on many runtimes in lock-step.

    Args:
        cluster: Where they run.
        blueprint: What each of them is built from; ``options.ray`` says how a step is cut.
        replicas: How many to start.
        run: The run's directory, which need not be there yet: its checkpoints help new replicas, and its board is where
            people read how the replicas do and ask for another number of them. None: there is no run.

    Attributes:
        layout: The sites.
        fingerprint: Of the base weights.
        team: The replicas.
        timings: Seconds so far that the replica with most to do has worked, and that the driver has waited besides.

    Raises:
        ConfigError: The cluster is too small.
        EngineError: A replica died while it started, or is not like the others.
        ZotuneError: What building the inner runtime raised.
    """

    def __init__(self, cluster: Cluster, blueprint: Blueprint, replicas: int, run: Path | None = None) -> None:
        self._blueprint, self._options = blueprint, blueprint.options.ray
        self._board = None if run is None else Board(run)
        self._history = History(run, blueprint.options.bank)
        self._news: list[str] = []
        self.team = Team(cluster, blueprint, self._history, self._options.patience, self._news.append)
        try:
            introduction = self.team.start(replicas)
        except BaseException:
            self.team.close()
            raise
        self.layout, self.fingerprint = introduction.layout, introduction.traits["model"]
        self._unit_tokens = self._options.unit_tokens or _unit_tokens(introduction, blueprint)
        self._numbers: dict[Row, int] = {}
        self._window = self._checked = 0
        self.timings = {"work": 0.0, "wait": 0.0}

    @classmethod
    def start(cls, blueprint: Blueprint, run: Path | None = None) -> RayRuntime:
        """Find or start a Ray cluster, and replicas on it.

        Args:
            blueprint: With options of the type ``ray``, as they are configured.
            run: See the class.

        Raises:
            ConfigError: Ray is not installed, there is no cluster at the address, or it is too small.
            ZotuneError: As for the class.
        """
        options = blueprint.options
        cpus = options.ray.cpus or options.threads or 1
        shards = options.vllm.tensor_parallel if options.ray.inner == "vllm" else 1
        inner = options.model_copy(update={"type": options.ray.inner, "threads": cpus})
        return cls(Cluster(options.ray, cpus, shards), replace(blueprint, options=inner), options.ray.replicas, run)

    def cut(
        self, probes: Sequence[Probe], rows: Sequence[Row], *, normalised: bool = True
    ) -> tuple[list[Unit], Callable[[Member, list[Unit]], Any]]:
        """The units of a question, and what asks a member for some of them."""
        planned = units.plan(probes, rows, split=self._options.split, unit_tokens=self._unit_tokens)
        packed = [wire.pack_probe(probe) for probe in probes]
        numbers = [self._numbers.setdefault(row, len(self._numbers)) for row in rows]
        by_number = dict(zip(numbers, rows, strict=True))

        def begin(member: Member, share: list[Unit]) -> Any:
            # Equal lists are pickled once if they are one object.
            named = {(unit.rows.start, unit.rows.stop): numbers[unit.rows] for unit in share}
            asked = [(packed[unit.probes], named[unit.rows.start, unit.rows.stop]) for unit in share]
            needed = {number: by_number[number] for found in named.values() for number in found}
            return member.begin("score", asked, normalised, rows=needed)

        return planned, begin

    def score(self, probes: Sequence[Probe], rows: Sequence[Row], *, normalised: bool = True) -> np.ndarray:
        """Log-likelihoods, float32 ``(probes, candidates)``; see `zotune.runtimes.base.Runtime.score`."""
        self._between_steps()
        planned, begin = self.cut(probes, rows, normalised=normalised)
        answers = self._spread([Part(unit.tokens, _rows(unit), unit) for unit in planned], begin)
        scores = [
            np.frombuffer(data, np.float32).reshape(_probes(unit), -1)
            for unit, data in zip(planned, answers, strict=True)
        ]
        return units.join(planned, scores, len(probes), rows)

    def generate(
        self, prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[tuple[int, ...]]:
        """What the clean model writes on; see `zotune.runtimes.base.Runtime.generate`."""
        self._between_steps()
        groups = [prompts[at : at + _PROMPTS] for at in range(0, len(prompts), _PROMPTS)]
        parts = [Part(sum(len(prompt) + max_new_tokens for prompt in group), len(group), group) for group in groups]

        def begin(member: Member, share: list[Any]) -> Any:
            return member.begin("generate", share, max_new_tokens, frozenset(stop))

        answers = self._spread(parts, begin)
        return [tokens for group in answers for tokens in group]

    def apply(self, update: Update) -> None:
        """Change the weights: every replica is told with the next question that it is asked."""
        self._history.append(update)
        self._window = update.window + update.closes_window

    def state(self) -> dict[str, Tensor]:
        """Tuned weights as last folded, accumulated update and rule state, as CPU tensors."""
        return self.team.state()

    def load_state(self, state: Mapping[str, Tensor], window: int) -> None:
        """Restore what `state` returned while ``window`` was current.

        Raises:
            JournalError: The tensors are not those of this layout and method.
        """
        self.team.load(state, window)
        self._window = window

    def export(self, path: Path) -> None:
        """Write the tuned model as an ordinary Hugging Face folder: the base with this state, in this process."""
        plan = self._blueprint
        twin = embedded.twin(plan.model, plan.method, seed=plan.seed, fold=plan.options.fold)
        twin.load_state(settled(self.state()), self._window)
        twin.export(path)

    def news(self) -> list[str]:
        """What has happened to replicas since the last time, in a line each."""
        news = self._news[:]
        del self._news[: len(news)]
        return news

    @property
    def traffic(self) -> Traffic:
        """What has travelled between the driver and the replicas so far."""
        return self.team.traffic

    def close(self) -> None:
        """End all replicas, and the cluster if it is this run's own."""
        self.team.close()

    def _spread(self, parts: Sequence[Part], begin: Begin) -> list[Any]:
        """The answers to parts of a question, in order."""
        began = time.perf_counter()
        spread = Spread(self.team, parts, begin, self._options.patience)
        answers = spread.run()
        self.timings["work"] += spread.work
        self.timings["wait"] += time.perf_counter() - began - spread.work
        return answers

    def _between_steps(self) -> None:
        """Heed the board, take in who is ready, and compare states when it is time."""
        if self._board is not None:
            wanted = self._board.wanted()
            if wanted is not None and wanted != self.team.wanted:
                self.team.resize(wanted)
        self.team.tend()
        if len(self._history) - self._checked >= self._options.check_every:
            self._checked = len(self._history)
            self.team.check()
        if self._board is not None:
            self._board.show(self.team)


def _unit_tokens(introduction: Introduction, blueprint: Blueprint) -> int:
    """Most tokens of a unit where the options say nothing."""
    most = blueprint.options.max_tokens
    # Every part of a cut draws its directions again, and to draw a dense one takes as long as the model is large.
    if blueprint.method.family == "dense":
        return most
    return min(most, _CPU_UNIT if introduction.traits["device"].startswith("CPU") else _GPU_UNIT)


def _probes(unit: Unit) -> int:
    return unit.probes.stop - unit.probes.start


def _rows(unit: Unit) -> int:
    """Rows under one probe each."""
    return _probes(unit) * (unit.rows.stop - unit.rows.start)
