"""What a report says, gathered from a run directory."""

from __future__ import annotations

import json
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune.config import Config
from zotune.figures import counted
from zotune.journal import read
from zotune.journal.branches import open_run
from zotune.presets import PRESETS, resolve
from zotune.reporters import SCORES
from zotune.run import RunDirectory
from zotune.watching import metrics
from zotune.watching.differences import defaults, shown, values
from zotune.watching.metrics import RunMetrics, number
from zotune.watching.report.examples import Changes, changes
from zotune.watching.standing import OVER, Standing, standing

Facts = tuple[tuple[str, str], ...]
"""Labelled values, in order."""


@dataclass(frozen=True)
class Outcome:
    """One figure before and after.

    Attributes:
        name: E.g. ``accuracy``.
        before: At the first evaluation.
        after: At the last one.
        best: The best of all, and the step after which it was reached.
        share: Whether it is a share, between 0 and 1, of which more is better; else it is a loss.
    """

    name: str
    before: float
    after: float
    best: tuple[float, int]
    share: bool

    @property
    def better(self) -> bool:
        """Whether it moved the right way."""
        return self.after > self.before if self.share else self.after < self.before


@dataclass(frozen=True)
class Setting:
    """A key of the configuration.

    Attributes:
        key: Dotted.
        value: As people write it.
        default: The same for its default; None where it has none, or where the value is the default.
    """

    key: str
    value: str
    default: str | None


@dataclass(frozen=True)
class Timings:
    """Where the time on record went, in seconds.

    Attributes:
        training: All steps.
        evaluating: All evaluations on the present validation rows.
        step: Median step.
        slowest: Slowest step, with its number.
        rows_per_s: Examples per second over all steps.
        forwards: Probes scored: each is one pass of the batch through the model.
        skipped: Steps without an estimate.
    """

    training: float
    evaluating: float
    step: float | None
    slowest: tuple[float, int] | None
    rows_per_s: float | None
    forwards: int
    skipped: int


@dataclass(frozen=True)
class Report:
    """All that the page says.

    Attributes:
        name: The run directory's name.
        summary: The run in one line.
        standing: Where it stands.
        steps: Steps that it is to take.
        outcomes: Before and after.
        metrics: The curves.
        changes: Examples whose prediction changed, where predictions are on record.
        timings: Where the time went.
        set: Settings that are not at their default.
        usual: The others.
        journal: Facts of the journal.
        commands: What to do next: a purpose and a command line each.
        environment: Versions and hardware.
    """

    name: str
    summary: str
    standing: Standing
    steps: int
    outcomes: tuple[Outcome, ...]
    metrics: RunMetrics
    changes: Changes | None
    timings: Timings
    set: tuple[Setting, ...]
    usual: tuple[Setting, ...]
    journal: Facts
    commands: Facts
    environment: Facts


def gather(path: Path) -> Report:
    """Read a run directory; nothing in it changes.

    Raises:
        JournalError: It is no run, or its journal or metrics cannot be read.
    """
    run, config = open_run(path)
    recorded, where = metrics.read(path), standing(run, config)
    everything = _settings(config)
    return Report(
        name=path.resolve().name,
        summary=_summary(config),
        standing=where,
        steps=config.train.steps,
        outcomes=_outcomes(recorded),
        metrics=recorded,
        changes=changes(path, config),
        timings=_timings(recorded, config),
        set=tuple(each for each in everything if each.default is not None),
        usual=tuple(each for each in everything if each.default is None),
        journal=_journal(run),
        commands=_commands(path, config, where),
        environment=_environment(run),
    )


def _summary(config: Config) -> str:
    preset = PRESETS[config.method.preset]
    what = config.data.task or shown(config.data.train)
    return f"{shown(config.model.path)} on {what}, by {preset.name}: {preset.summary}"


def _outcomes(recorded: RunMetrics) -> tuple[Outcome, ...]:
    """The scores and the loss, as far as the first and the last evaluation have them."""
    if not recorded.evaluations:
        return ()
    first, last = recorded.evaluations[0], recorded.evaluations[-1]
    return tuple(
        Outcome(name.replace("_", " "), first[name], last[name], _best(recorded, name), share=name in SCORES)
        for name in (*SCORES, "loss")
        if first.get(name) is not None and last.get(name) is not None
    )


def _best(recorded: RunMetrics, name: str) -> tuple[float, int]:
    """The highest score or the lowest loss, and the first step that reached it."""
    known = [(record[name], record["step"]) for record in recorded.evaluations if record.get(name) is not None]
    sign = -1 if name in SCORES else 1
    return min(known, key=lambda each: (sign * each[0], each[1]))


def _settings(config: Config) -> list[Setting]:
    usual = defaults(values(config))
    return [
        Setting(key, _written(value), None if key in usual and usual[key] == value else _default(usual, key))
        for key, value in values(config).items()
        if value is not None or usual.get(key) is not None
    ]


def _default(usual: dict[str, Any], key: str) -> str:
    return _written(usual[key]) if usual.get(key) is not None else ""


def _written(value: Any) -> str:
    """A value as in the configuration, with no part of it left out."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _timings(recorded: RunMetrics, config: Config) -> Timings:
    timed = [record for record in recorded.steps if record["seconds"] is not None]
    seconds = [record["seconds"] for record in timed]
    slowest = max(timed, key=lambda record: record["seconds"], default=None)
    return Timings(
        training=recorded.seconds,
        evaluating=sum(number(record["seconds"]) for record in recorded.evaluations),
        # What the first step of a run costs more, such as compilation, is in the total and not in the median.
        step=statistics.median(seconds) if seconds else None,
        slowest=None if slowest is None else (slowest["seconds"], slowest["step"]),
        rows_per_s=config.train.batch_size * len(timed) / sum(seconds) if sum(seconds) else None,
        forwards=resolve(config.method).probes * len(recorded.steps),
        skipped=sum(bool(record["skipped"]) for record in recorded.steps),
    )


def _journal(run: RunDirectory) -> Facts:
    journal = read(run.journal)
    header, steps = journal.header, len(journal.entries)
    per_step = f", {journal.size / steps:.0f} bytes a step" if steps else ""
    return (
        ("steps", f"{steps:,}"),
        ("size", f"{journal.size:,} bytes{per_step}"),
        ("seed", str(header.seed)),
        ("fold", header.fold),
        ("base model", header.model),
        ("layout", header.layout),
        ("data", header.data),
    )


def _commands(path: Path, config: Config, where: Standing) -> Facts:
    """Command lines for what one may want to do next, from the directory in which the report was asked for."""
    found = []
    if where.state not in OVER:
        found.append(("go on", ["resume", path]))
    elif where.state == "finished" and resolve(config.method).schedule == "constant":
        found.append(("make it twice as long", ["resume", path, "--steps", 2 * config.train.steps]))
    found += [
        ("evaluate", ["eval", path]),
        ("export as a Hugging Face folder", ["export", path, "--out", f"{path}-merged"]),
        ("rebuild the weights of a step", ["replay", path, "--step", where.steps // 2, "--out", f"{path}-replayed"]),
    ]
    return tuple((purpose, shlex.join(["zotune", *map(str, words)])) for purpose, words in found)


def _environment(run: RunDirectory) -> Facts:
    """What the manifest says; nothing where it is missing or damaged."""
    manifest = run.read_manifest()
    try:
        gpus, used = manifest["gpus"], counted(manifest["threads"], "thread")
        facts = {
            "started": manifest["started"],
            "command": shlex.join(manifest["command"]),
            "platform": manifest["platform"],
            "processor": f"{manifest['cpu']}, {counted(manifest['cores'], 'core')}, {used} used",
            "GPU": ", ".join(gpus) if gpus else "none",
            **{name: version for name, version in manifest["versions"].items() if version is not None},
        }
    except (KeyError, TypeError, AttributeError):
        return ()
    return tuple((label, str(value)) for label, value in facts.items())
