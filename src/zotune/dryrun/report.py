"""The dry run itself, and how it reads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count, islice
from typing import Any

from zotune import models
from zotune.config import MADE, Config
from zotune.dryrun.estimate import Memory, Time, measure
from zotune.dryrun.tokens import TokenRow
from zotune.errors import required
from zotune.figures import duration, size
from zotune.layout import Layout
from zotune.paths import expand
from zotune.rows import Example
from zotune.run import resolved
from zotune.session import Session

ROWS = 5


@dataclass(frozen=True)
class Part:
    """Counts of a split: examples, tokens that one pass over them computes, those of the longest row, scored tokens."""

    rows: int
    tokens: int
    longest: int
    scored: int

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Part:
        """Count."""
        lengths = [example.row.n_tokens for example in examples]
        scored = sum(len(candidate.scored) for example in examples for candidate in example.row.candidates)
        return cls(len(examples), sum(lengths), max(lengths), scored)


@dataclass(frozen=True)
class DryRun:
    """What a run would do; nothing was trained and nothing was written.

    Attributes:
        rows: The first five training rows that the run would take.
        train: Counts of the training rows.
        validation: Counts of the validation rows.
        steps: Steps of the run.
        batch_size: Examples per step.
        sites: The layout of what would be tuned.
        memory: Estimate.
        time: Estimate.
        notices: What the run would tell at its start.
    """

    rows: tuple[TokenRow, ...]
    train: Part
    validation: Part
    steps: int
    batch_size: int
    sites: Layout
    memory: Memory
    time: Time
    notices: tuple[str, ...]

    @property
    def batches(self) -> int:
        """Batches that take every training row once, the last one filled up from the next epoch."""
        return -(-self.train.rows // self.batch_size)

    def record(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        kinds = [{"name": name, "shape": shape, "count": number} for (name, shape), number in _kinds(self.sites)]
        return {
            "rows": [asdict(row) for row in self.rows],
            "train": asdict(self.train),
            "validation": asdict(self.validation),
            "steps": self.steps,
            "batch_size": self.batch_size,
            "batches_per_epoch": self.batches,
            "sites": {
                "count": len(self.sites.sites),
                "parameters": self.sites.size,
                "kinds": kinds,
                "names": [site.name for site in self.sites.sites],
            },
            "memory_bytes": asdict(self.memory) | {"total": self.memory.total},
            "seconds": asdict(self.time),
            "notices": list(self.notices),
        }

    def __str__(self) -> str:
        return "\n".join(
            (
                "training rows, tokens apart, scored tokens in ⟦ ⟧, the right candidate after >",
                *chain.from_iterable(["", *row.lines()] for row in self.rows),
                "",
                *_counts(self),
                "",
                f"{len(self.sites.sites)} sites with {self.sites.size:,} parameters",
                *(f"  {number:>4} x {name}  {_extent(shape)}" for (name, shape), number in _kinds(self.sites)),
                "",
                *_needs(self.memory, self.time),
                "",
                *self.notices,
                "nothing was trained and nothing was written",
            )
        )


def dry_run(config: Config) -> DryRun:
    """Load model and data, look at them, and score some of it to time that; no run directory is made.

    Args:
        config: What a run would do.

    Raises:
        ZotuneError: What a run would raise before its first step, but for an output directory that exists, which is
            a notice.
    """
    config, notices = _embedded(resolved(required(config, Config, MADE)))
    session = Session.build(config)
    tokenizer = models.load_tokenizer(config.model)
    indices = chain.from_iterable(session.order.indices(step) for step in count())
    # No row comes again before all have been.
    first = [session.data.train[i] for i in islice(indices, min(ROWS, len(session.data.train)))]
    memory, seconds = measure(session)
    taken = [f"{config.output} exists; the run needs another output"] if expand(config.output).exists() else []
    return DryRun(
        tuple(TokenRow.of(example, tokenizer) for example in first),
        Part.of(session.data.train),
        Part.of(session.data.validation),
        config.train.steps,
        config.train.batch_size,
        session.runtime.layout,
        memory,
        seconds,
        (*notices, *session.data.notices, *taken),
    )


def _embedded(config: Config) -> tuple[Config, tuple[str, ...]]:
    """The run in this process, whatever would run it, and what is to be told of that."""
    if config.runtime.type == "torch":
        return config, ()
    notice = f"memory and time are those of runtime.type = 'torch'; '{config.runtime.type}' was not started"
    return config.having("runtime", type="torch"), (notice,)


def _counts(run: DryRun) -> list[str]:
    parts = [
        f"{name:10}  {part.rows:>8,} rows  {part.tokens:>10,} tokens  longest {part.longest:,}  scored {part.scored:,}"
        for name, part in (("train", run.train), ("validation", run.validation))
    ]
    epochs = run.steps * run.batch_size / run.train.rows
    batches = f"{run.batches:,} batches of {run.batch_size} rows take every training row once"
    return [*parts, f"{batches}; {run.steps:,} steps are {epochs:.1f} epochs"]


def _kinds(layout: Layout) -> list[tuple[tuple[str, tuple[int, ...]], int]]:
    """Names with a star for layer numbers, with shapes and how many sites there are of each."""
    return list(Counter((re.sub(r"\.\d+\.", ".*.", site.name), site.shape) for site in layout.sites).items())


def _extent(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _needs(memory: Memory, seconds: Time) -> list[str]:
    chosen = f", {duration(seconds.choosing)} of it to choose the learning rate" if seconds.choosing else ""
    return [
        f"memory, estimated: {size(memory.total)} = weights {size(memory.weights)} + directions and updates "
        f"{size(memory.factors)} + activations of the largest batch {size(memory.activations)}",
        f"memory, measured: {size(memory.measured)} at most, the program itself included, while one step was scored",
        f"time, estimated: {duration(seconds.total)} at {seconds.step:.2g} s per step and {seconds.evaluation:.2g} s "
        f"per evaluation{chosen}; updates and generation come on top",
    ]
