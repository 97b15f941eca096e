from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from zotune.progress import TerminalReporter


class Clock:
    """A clock that stands still until it is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def step(number: int, loss: float | None = 0.6, **values: Any) -> dict[str, Any]:
    record = {"kind": "step", "step": number, "loss": loss, "lr": 1e-6, "coefficients": [0.5]}
    return {**record, "seconds": 0.5, "rows_per_s": 32.0, "skipped": False, **values}


def evaluation(number: int, loss: float, accuracy: float | None) -> dict[str, Any]:
    return {"kind": "eval", "step": number, "loss": loss, "accuracy": accuracy, "seconds": 7.0}


def test_without_a_terminal_there_is_one_plain_line_per_evaluation_and_notice() -> None:
    stream, clock = io.StringIO(), Clock()
    live = TerminalReporter(Console(file=stream), clock)
    live.start(Path("runs/a[b]"), steps=1000, done=0)
    live.notice("12 rows were cut to [64] tokens, " + "which is long " * 10)
    live.evaluation(evaluation(0, 0.6931, 0.525))
    for number in range(1, 101):
        clock.now += 0.5
        live.step(step(number))
    live.evaluation(evaluation(100, 0.512, 0.783))
    live.finish()
    assert stream.getvalue().splitlines() == [
        "run runs/a[b]: 1000 steps",
        "12 rows were cut to [64] tokens, " + "which is long " * 10,
        "step 0/1000  loss 0.693  accuracy 52.5 %",
        "step 100/1000  loss 0.512  accuracy 78.3 %  32 rows/s  7:30 left",
    ]


def test_time_left_counts_this_sitting_and_its_evaluations() -> None:
    stream, clock = io.StringIO(), Clock()
    live = TerminalReporter(Console(file=stream), clock)
    live.start(Path("run"), steps=30, done=10)
    clock.now += 60  # the evaluation before the first step, which comes once
    clock.now += 1
    live.step(step(11, seconds=1.0))
    clock.now += 9
    live.step(step(20, seconds=1.0))
    clock.now += 10  # an evaluation as it will come again
    live.evaluation(evaluation(20, 0.5, None))
    live.step(step(30))
    live.evaluation(evaluation(30, 0.4, None))
    assert stream.getvalue().splitlines() == [
        "run run: 30 steps, 10 done",
        "step 20/30  loss 0.500  32 rows/s  0:20 left",
        "step 30/30  loss 0.400  32 rows/s",
    ]


@pytest.mark.parametrize("width", [80, 140])
def test_on_a_terminal_a_bar_shows_the_latest_step(width: int) -> None:
    stream = io.StringIO()
    # Without colours a bar is only as long as what is done.
    console = Console(file=stream, force_terminal=True, no_color=True, width=width, _environ={})
    live = TerminalReporter(console, Clock())
    live.start(Path("run"), steps=40, done=0)
    live.evaluation(evaluation(0, 0.7, 0.5))
    live.step(step(1, 0.8))
    live.step(step(2, None, skipped=True))
    live.step(step(3, 0.4))
    live.finish()
    live.finish()
    shown = stream.getvalue()
    assert "step 0/40  loss 0.700  accuracy 50.0 %\n" in shown
    # The average of 0.8 and 0.4 with weights 0.95 and 1; the skipped step takes no part.
    assert "step 3/40  loss 0.400  smoothed 0.595  accuracy 50.0 %  32 rows/s" in shown
    assert ("0:06 left  1 skipped" in shown) == ("━" in shown) == (width == 140), "a narrow terminal has no room"
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor must come back"


def test_written_answers_have_their_scores_on_the_line() -> None:
    stream = io.StringIO()
    live = TerminalReporter(Console(file=stream), Clock())
    live.evaluation({**evaluation(0, 0.7, None), "exact_match": 0.25, "f1": 0.5})
    assert stream.getvalue() == "step 0/0  loss 0.700  f1 50.0 %  exact match 25.0 %\n"


NOTEBOOK = """
from pathlib import Path
from rich.console import Console
from zotune.progress import TerminalReporter

live = TerminalReporter(Console())
live.start(Path("runs/a[b]"), 40, 0)
live.evaluation({"kind": "eval", "step": 0, "loss": 0.7, "accuracy": 0.5, "seconds": 1})
for number in range(1, 41):
    live.step({"kind": "step", "step": number, "loss": 0.6, "lr": 1e-5, "coefficients": [1.0], "seconds": 0.01,
               "rows_per_s": 100, "skipped": False})
live.evaluation({"kind": "eval", "step": 40, "loss": 0.4, "accuracy": 0.8, "seconds": 1})
live.finish()
live.finish()
"""


def test_in_a_notebook_one_line_is_replaced() -> None:
    """In a real kernel, as a converted notebook would keep it."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    lines = "".join(each.text for each in outputs if each.output_type == "stream").splitlines()
    assert lines == [
        "run runs/a[b]: 40 steps",
        "step 0/40  loss 0.700  accuracy 50.0 %",
        "step 40/40  loss 0.400  accuracy 80.0 %  100 rows/s",
    ]
    (live,) = (each.data for each in outputs if each.output_type == "display_data")
    assert live == {"text/plain": "step 40/40  loss 0.600  smoothed 0.600  accuracy 80.0 %  100 rows/s"}
    assert "\x1b" not in json.dumps(outputs)
