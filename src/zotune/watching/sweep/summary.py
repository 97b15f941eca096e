"""What the runs of a sweep came to: one row per run, one per setting where seeds vary."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zotune.errors import ConfigError, JournalError, required
from zotune.figures import finite, from_json
from zotune.reporters import SCORES
from zotune.watching import metrics
from zotune.watching.metrics import RunMetrics, number
from zotune.watching.overlays import overlay
from zotune.watching.standing import OVER, Standing, State
from zotune.watching.sweep.plan import PLANNED, Plan, Planned, Point
from zotune.watching.sweep.work import whereabouts

SEED = "train.seed"


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        name: Its directory's name.
        point: What it sets, by dotted key.
        state: Where it stands.
        reason: Why it failed, where it did.
        steps: Finished steps.
        seconds: Of training, evaluations left out.
        loss: Of the last evaluation; None where there is none or it is not finite.
        best_loss: The lowest of all evaluations.
        score: Share of the last evaluation that the sweep is judged by, if there is one.
        best_score: The highest of all evaluations.
    """

    name: str
    point: Point
    state: State
    reason: str | None
    steps: int
    seconds: float
    loss: float | None
    best_loss: float | None
    score: float | None
    best_score: float | None


@dataclass(frozen=True)
class Group:
    """Runs that ended and differ in nothing but the seed.

    Attributes:
        point: What they have in common.
        runs: How many there are.
        loss: Mean of their final losses.
        loss_std: Sample standard deviation (n - 1) of these; None for a single run.
        score: Mean of their final scores, if they have one.
        score_std: As for the loss.
    """

    point: Point
    runs: int
    loss: float
    loss_std: float | None
    score: float | None
    score_std: float | None


@dataclass(frozen=True)
class Summary:
    """A sweep's results.

    Attributes:
        folder: The sweep's.
        score: Name of the share that runs are judged by; None where only losses can be compared.
        keys: What varies.
        rows: Best first, by the score of the last evaluation, or by its loss.
        groups: Best first; empty unless seeds vary.
        plot: The curves of all runs over each other; None while there are none.
        failures: What the runs that failed ended with when they were last tried, by name. What keeps a run from being
            tried at all, such as another one in its place, is not among them: it is looked for anew each time.
    """

    folder: Path
    score: str | None
    keys: tuple[str, ...]
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    plot: Path | None
    failures: Mapping[str, str]


def summarise(plan: Plan, failures: Mapping[str, str] | None = None) -> Summary:
    """Gather what is on disk, and write ``summary.json`` and ``curves.png`` into the sweep's folder.

    Args:
        plan: The sweep.
        failures: Why runs failed, by name; None: as the last summary said.

    Raises:
        ConfigError: The folder cannot be written.
    """
    required(plan, Plan, PLANNED)
    failures = _recorded(plan.folder) if failures is None else failures
    standings = {each.name: whereabouts(each) for each in plan.runs}
    recorded = {each.name: _metrics(each) for each in plan.runs if standings[each.name].state != "failed"}
    known = {name: found for name, found in recorded.items() if found is not None}
    scores = {found.score_name for found in known.values()}
    score = next((name for name in SCORES if name in scores), None)
    rows = [_row(each, standings[each.name], known.get(each.name), score, failures) for each in plan.runs]
    paths = [each.path for each in plan.runs if each.name in known]
    summary = Summary(
        folder=plan.folder,
        score=score,
        keys=plan.keys,
        rows=tuple(sorted(rows, key=_rank)),
        groups=tuple(sorted(_groups(rows), key=_rank)),
        plot=overlay(paths, plan.folder / "curves.png") if paths else None,
        failures={row.name: row.reason for row in rows if row.reason and standings[row.name].state != "failed"},
    )
    _write(summary)
    return summary


def record(summary: Summary) -> dict[str, Any]:
    """The summary as JSON can hold it."""
    return asdict(summary) | {
        "folder": str(summary.folder),
        "keys": list(summary.keys),
        "plot": None if summary.plot is None else str(summary.plot),
    }


def _metrics(planned: Planned) -> RunMetrics | None:
    """What a run has recorded; None if that is nothing, or cannot be read."""
    try:
        return metrics.read(planned.path)
    except JournalError:
        return None


def _row(
    planned: Planned, where: Standing, found: RunMetrics | None, score: str | None, failures: Mapping[str, str]
) -> Row:
    state, reason = where.state, where.reason
    if state in ("waiting", "interrupted") and planned.name in failures:
        state, reason = "failed", failures[planned.name]
    evaluations = found.evaluations if found else ()
    losses = [number(each["loss"]) for each in evaluations]
    scores = [number(each.get(score)) for each in evaluations] if score else []
    sound = [loss for loss in losses if math.isfinite(loss)]
    known = [share for share in scores if math.isfinite(share)]
    return Row(
        name=planned.name,
        point=planned.point,
        state=state,
        reason=reason,
        steps=where.steps,
        seconds=round(found.seconds, 3) if found else 0.0,
        loss=finite(losses[-1]) if losses else None,
        best_loss=min(sound, default=None),
        score=finite(scores[-1]) if scores else None,
        best_score=max(known, default=None),
    )


def _groups(rows: Sequence[Row]) -> list[Group]:
    """The runs that ended, put together by what they set beside the seed."""
    settings: dict[str, list[Row]] = {}
    for row in rows:
        if row.state in OVER and row.loss is not None and SEED in row.point:
            settings.setdefault(json.dumps(_without_seed(row.point), sort_keys=True), []).append(row)
    if all(len(members) == 1 for members in settings.values()):
        return []
    return [_group(members) for members in settings.values()]


def _group(members: Sequence[Row]) -> Group:
    losses = [row.loss for row in members if row.loss is not None]
    scores = [row.score for row in members if row.score is not None]
    return Group(
        point=_without_seed(members[0].point),
        runs=len(members),
        loss=statistics.fmean(losses),
        loss_std=_deviation(losses),
        score=statistics.fmean(scores) if scores else None,
        score_std=_deviation(scores),
    )


def _without_seed(point: Point) -> Point:
    return {key: value for key, value in point.items() if key != SEED}


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _rank(row: Row | Group) -> tuple[float, float]:
    """Ascending from the best; what has no figures comes last."""
    return (math.inf if row.score is None else -row.score, math.inf if row.loss is None else row.loss)


def _recorded(folder: Path) -> dict[str, str]:
    """The failures of the last summary; none if it cannot be read."""
    try:
        found = from_json((folder / "summary.json").read_text(encoding="utf-8"))["failures"]
        return {name: str(reason) for name, reason in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(summary: Summary) -> None:
    try:
        summary.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record(summary), indent=2, default=str)
        (summary.folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the summary into {summary.folder}: {error.strerror or error}") from error
