"""The report's section on ``zotune bench overhead``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zotune.bench.report.section import Section, device, grouped, paragraphs, sound, table
from zotune.bench.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NOTE = (
    "Milliseconds of a step by phase; the fold is a share of one, as it comes once in a window. `rpc`: what a call of "
    "the runtime takes beyond its phases. `host`: on a GPU, what the host takes while the device waits for it; the aim "
    "is 1.5 ms. `hidden`: what it gets ready for the next step while the device works."
)


def render(results: Sequence[Result]) -> Section:
    """A line per case, and a bar."""
    found = sorted(sound(results), key=_order)
    tables = [
        paragraphs(f"### {where}, {dtype}, {threads} CPU threads", _table(members))
        for (where, dtype, threads), members in grouped(
            found, lambda result: (device(result), result.case["dtype"], result.case["threads"])
        ).items()
    ]
    pictures = {"overhead": lambda: _draw(found)} if found else {}
    return Section.on(results, "Where a step goes", _NOTE, *tables, pictures=pictures)


def _order(result: Result) -> tuple[object, ...]:
    return tuple(result.case[name] for name in ("model", "batch_size", "directions", "rank", "scope", "runtime"))


def _table(results: Sequence[Result]) -> str:
    phases = list(results[0].figures["phases_s"])
    settings = ("model", "runtime", "scope", "batch_size", "rank", "directions")
    headings = ["model", "runtime", "scope", "batch", "rank", "directions", "step", *phases]
    headings += ["not forward or head", "host", "hidden"]
    rows = [
        [
            *(result.case[name] for name in settings),
            _ms(result.figures["step_s"]),
            *(_ms(result.figures["phases_s"][name]) for name in phases),
            f"{_rest(result):.1%}",
            *("" if (value := result.figures.get(name)) is None else _ms(value) for name in ("host_s", "hidden_s")),
        ]
        for result in results
    ]
    return table(headings, rows, words=3)


def _rest(result: Result) -> float:
    """Share of the step that is neither forward nor output head."""
    phases = result.figures["phases_s"]
    return 1.0 - float(phases["forward"] + phases["head"]) / float(result.figures["step_s"])


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _draw(results: Sequence[Result]) -> Figure:
    """Every case as a bar of its phases' shares."""
    from matplotlib import colormaps
    from matplotlib.ticker import PercentFormatter

    from zotune.watching.plots import INK, panels

    figure, (axes,) = panels(1)
    figure.set_size_inches(9, 1.6 + 0.5 * len(results))
    names = [f"{r.case['model']}, {r.case['runtime']}, batch {r.case['batch_size']}" for r in results]
    left = [0.0] * len(results)
    places = range(len(results))
    for number, phase in enumerate(results[0].figures["phases_s"]):
        shares = [max(0.0, r.figures["phases_s"][phase] / r.figures["step_s"]) for r in results]
        axes.barh(places, shares, left=left, label=phase, color=colormaps["tab10"](number), height=0.6)
        left = [begun + share for begun, share in zip(left, shares, strict=True)]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("share of a step", color=INK)
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.grid(visible=False)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
