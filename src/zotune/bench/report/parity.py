"""The report's section on ``zotune bench parity``: how sides agree, from the losses that their results hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from zotune.bench.parity_sides import Side, causes
from zotune.bench.report import section
from zotune.bench.results import Result

_LAST = 20
"""Steps at the end of a trajectory whose mean loss counts as its last."""

_ORACLE = Side("oracle")
_STATES = ("clean", "plus", "minus")
_FORMATS = {"equal signs": ".1%", "correlation": ".6f", "last loss": ".4f", "of the reference": ".4f"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: What all of its rows share.
        rows: Values by heading; all rows have the same headings.
    """

    title: str
    rows: Sequence[Row]

    def markdown(self) -> str:
        """The table in Markdown, under its title."""
        rows = [[_shown(*item) for item in row.items()] for row in self.rows]
        return section.paragraphs(f"**{self.title}**", section.table(list(self.rows[0]), rows))


def render(results: Sequence[Result]) -> section.Section:
    """All tables."""
    return section.Section.on(results, "Parity with the oracle", *(table.markdown() for table in tables(results)))


def _shown(heading: str, value: Any) -> str:
    return format(value, _FORMATS.get(heading, ".1e")) if isinstance(value, float) else str(value)


def tables(results: Iterable[Result]) -> list[Table]:
    """All tables that the results of ``zotune bench parity`` make; what failed is in none of them."""
    measured = section.sound(results)
    found = []
    for about, sides in _grouped(measured, "probes"):
        found += [Table(f"Against the reference: {about}", list(_agreements(sides)))]
        # Where only the distance was swept, dtype is the one cause that was not left open.
        if len(rows := list(_by_cause(sides))) > 1:
            found += [Table(f"Error by cause: {about}", rows)]
    for about, distances in _grouped(measured, "probes", "eps"):
        found += [Table(f"Coefficients against slopes: {about}", list(_by_distance(distances)))]
    for about, runs in _grouped(measured, "trajectory", "seed"):
        found += [Table(f"Trajectories: {about}", list(_trajectories(runs)))]
    return [table for table in found if table.rows]


_Group = Mapping[Any, Mapping[str, Any]]


def _grouped(results: Iterable[Result], what: str, *apart: str) -> Iterator[tuple[str, _Group]]:
    """Results that differ in nothing but side and in ``apart``, under what they share.

    Each group has the figures by side, or by side and the values of ``apart``. Of two results that differ only in how
    many probes there were, the longer one counts: it begins with the other.
    """
    left_out = {field.name for field in fields(Side)} | {"what", "probes", *apart}
    groups: dict[str, dict[Any, Mapping[str, Any]]] = {}
    for result in sorted(results, key=lambda result: result.case.get("probes", 0)):
        if result.case["what"] == what:
            shared = {k: v for k, v in result.case.items() if k not in left_out and v is not None}
            side, rest = Side.of(result.case), tuple(result.case[name] for name in apart)
            groups.setdefault(json.dumps(shared), {})[(side, *rest) if apart else side] = result.figures
    for text, group in sorted(groups.items()):
        yield ", ".join(f"{name} {value}" for name, value in json.loads(text).items()), group


def _order(side: Side) -> tuple[Any, ...]:
    return side.runtime, side.dtype != "float32", side.dtype


def _references(side: Side, known: Iterable[Side]) -> list[Side]:
    """What a side is compared with: the oracle, and the embedded runtime in the same dtype."""
    wanted = () if side == _ORACLE else (_ORACLE, replace(side, runtime="torch"))
    return [each for each in wanted if each != side and each in known]


def _agreements(sides: _Group) -> Iterator[Row]:
    for side in sorted(sides, key=_order):
        if side == replace(_ORACLE, runtime=side.runtime, dtype=side.dtype) and "plus" in sides[side]:
            for reference in _references(side, sides):
                named = {"runtime": side.runtime, "dtype": side.dtype, "reference": reference.runtime}
                yield named | _compared(sides[side], sides[reference], by_state=True)


def _by_cause(sides: _Group) -> Iterator[Row]:
    for dtype in dict.fromkeys(side.dtype for side in sorted(sides, key=_order)):
        for cause in causes(dtype):
            if cause.before in sides and cause.after in sides:
                named = {"cause": cause.name, "dtype": dtype}
                yield named | _compared(sides[cause.after], sides[cause.before], by_state=False)


def _by_distance(distances: _Group) -> Iterator[Row]:
    slopes = next((figures["slopes"] for figures in distances.values() if "slopes" in figures), None)
    moved = {(eps, side): figures for (side, eps), figures in distances.items() if side == Side(dtype=side.dtype)}
    if slopes is not None and len(moved) > 1:
        for (eps, side), figures in sorted(moved.items(), key=lambda item: (item[0][0], _order(item[0][1]))):
            n = min(len(figures["plus"]), len(slopes))
            found = coefficients(figures, eps)
            yield {"eps": f"{eps:g}", "dtype": side.dtype, "probes": n} | agreement(found[:n], slopes[:n])


def _compared(mine: Mapping[str, Any], reference: Mapping[str, Any], *, by_state: bool) -> Row:
    """Losses relative to the reference's, largest of all probes and in the mean square, then the coefficients.

    Where one side has more probes, the first ones of both are compared.
    """
    n = min(len(each["plus"]) for each in (mine, reference))
    mine, reference = ({state: each[state][:n] for state in _STATES} for each in (mine, reference))
    differences = {state: relative(mine[state], reference[state]) for state in _STATES}
    largest = {state: float(found.max()) for state, found in differences.items()}
    together = np.concatenate(list(differences.values()))
    losses = largest if by_state else {"largest": max(largest.values())}
    # Both have the same distance, which drops out of what is compared.
    pair = [coefficients(each, 0.5) for each in (mine, reference)]
    return {"probes": n} | losses | {"rms of losses": float(np.sqrt(np.mean(together**2)))} | agreement(*pair)


def relative(mine: Sequence[float], reference: Sequence[float]) -> np.ndarray:
    """Differences over the reference, without their signs."""
    expected = np.asarray(reference)
    found: np.ndarray = np.abs(np.asarray(mine) - expected) / np.abs(expected)
    return found


def coefficients(figures: Mapping[str, Any], eps: float) -> np.ndarray:
    """Two-point coefficients from plus and minus losses."""
    found: np.ndarray = (np.asarray(figures["plus"]) - np.asarray(figures["minus"])) / (2 * eps)
    return found


def agreement(mine: Sequence[float] | np.ndarray, reference: Sequence[float] | np.ndarray) -> Row:
    """How coefficients of the same directions agree.

    Returns:
        Share of equal signs; Pearson's correlation; root of the mean square of the differences over the reference's.
    """
    a, b = np.asarray(mine), np.asarray(reference)
    spread = a.std() > 0 and b.std() > 0
    return {
        "equal signs": float(np.mean(np.sign(a) == np.sign(b))),
        "correlation": float(np.corrcoef(a, b)[0, 1]) if spread else float("nan"),
        "rms of coefficients": float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))),
    }


def _trajectories(runs: _Group) -> Iterator[Row]:
    by_side: dict[Side, dict[int, Mapping[str, Any]]] = {}
    for (side, seed), figures in runs.items():
        by_side.setdefault(side, {})[seed] = figures
    for side in sorted(by_side, key=_order):
        mine = by_side[side]
        for reference in _references(side, by_side):
            seeds = sorted(mine.keys() & by_side[reference].keys())
            pairs = [(mine[seed], by_side[reference][seed]) for seed in seeds]
            named = {"runtime": side.runtime, "dtype": side.dtype, "reference": reference.runtime, "seeds": len(seeds)}
            if pairs:
                yield named | _followed(pairs)


def _followed(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Row:
    """How far runs stay together, and the spread of the reference's last loss over its seeds."""
    apart = np.stack([relative(mine["losses"], reference["losses"]) for mine, reference in pairs])
    lasts = np.array([[np.mean(run["losses"][-_LAST:]) for run in pair] for pair in pairs])
    joined = [np.concatenate([pair[which]["coefficients"] for pair in pairs]) for which in (0, 1)]
    return {
        "largest": float(apart.max()),
        "rms of losses": float(np.sqrt(np.mean(apart**2))),
        "last loss": float(lasts[:, 0].mean()),
        "of the reference": float(lasts[:, 1].mean()),
        "spread over seeds": float(lasts[:, 1].std(ddof=1)) if len(pairs) > 1 else "-",
        "difference": float(np.abs(lasts[:, 0] - lasts[:, 1]).max()),
    } | agreement(*joined)


def to_json(results: Iterable[Result]) -> dict[str, Any]:
    """The tables as plain data."""
    return {"tables": [asdict(table) for table in tables(results)]}
