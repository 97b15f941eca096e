"""Parity: the oracle's losses and zotune's, switched one thing at a time, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from zotune import cli
from zotune.bench import parity
from zotune.bench.parity_sides import Side, causes
from zotune.bench.report import parity as parity_report
from zotune.bench.results import Result
from zotune.errors import ConfigError, ModelError

SMALL: dict[str, Any] = {
    "models": ("tiny:llama",),
    "sides": ("oracle", "torch"),
    "probes": 5,
    "batch_size": 4,
    "steps": 5,
}


def measure(folder: Path, **options: Any) -> list[Result]:
    comparison = parity.Comparison(**SMALL | options)
    return parity.parity(comparison, folder, console=Console(quiet=True), threads=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The tables' rows by the first word of their title."""
    results = measure(tmp_path_factory.mktemp("parity"))
    assert not [result.figures["error"] for result in results if "error" in result.figures]
    return {table.title.split()[0].rstrip(":"): list(table.rows) for table in parity_report.tables(results)}


def test_float32_is_the_oracle_and_bfloat16_is_near(rows: dict[str, list[dict[str, Any]]]) -> None:
    exact, rounded = rows["Against"]
    assert (exact["dtype"], rounded["dtype"]) == ("float32", "bfloat16")
    assert max(exact[state] for state in ("clean", "plus", "minus")) < 1e-5
    assert exact["correlation"] > 0.9999
    assert 1e-4 < rounded["rms of losses"] < 2e-2


def test_each_cause_is_small_in_float32_and_shows_in_bfloat16(rows: dict[str, list[dict[str, Any]]]) -> None:
    errors = {(row["cause"], row["dtype"]): row["rms of losses"] for row in rows["Error"]}
    assert {dtype for _, dtype in errors} == {"float32", "bfloat16"}
    assert all(error < 1e-5 for (_, dtype), error in errors.items() if dtype == "float32")
    for cause in ("dtype", "16-bit logits (not done)", "attention kernel"):
        assert errors[cause, "bfloat16"] > 1e-5, f"{cause} switches nothing"


def test_coefficients_near_the_slopes_where_neither_rounding_nor_curvature_shows(
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    errors = {(row["eps"], row["dtype"]): row["rms of coefficients"] for row in rows["Coefficients"]}
    assert errors["0.0001", "float32"] < 5e-3
    assert errors["0.03", "float32"] > 10 * errors["0.0001", "float32"], "curvature must show"
    assert errors["1e-05", "bfloat16"] > 10 * errors["0.003", "bfloat16"], "rounding must show"


def test_trajectories_stay_together(rows: dict[str, list[dict[str, Any]]]) -> None:
    exact = rows["Trajectories"][0]
    assert (exact["runtime"], exact["dtype"], exact["reference"]) == ("torch", "float32", "oracle")
    assert exact["largest"] < 1e-4


def test_the_oracle_tunes_the_lora_matrices_that_a_preset_does(tmp_path: Path) -> None:
    options = {"parts": ("trajectories",), "presets": ("mezo-lora",), "dtypes": ("float32",)}
    (table,) = parity_report.tables(measure(tmp_path, **options))
    assert table.rows[0]["correlation"] > 0.9999


def test_neighbouring_sides_differ_in_one_thing() -> None:
    for dtype in ("float32", "bfloat16"):
        for cause in causes(dtype):
            if cause.before.runtime != "oracle":
                a, b = vars(cause.before), vars(cause.after)
                assert sum(a[name] != b[name] for name in a) == 1, cause.name


def test_what_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"parts": ("runtimes",), "sides": ("torch",), "dtypes": ("float32",)}
    first = measure(tmp_path, **options)
    # The causes have one side in common with the runtimes, and it is taken as it is.
    again = measure(tmp_path, **options | {"parts": ("runtimes", "causes")})
    assert again[0].machine["date"] == first[0].machine["date"]
    assert len(again) == 5
    assert len(list(tmp_path.iterdir())) == 5


def test_dense_directions_are_not_asked_of_compiled_code() -> None:
    sides = ("vllm", "vllm-compiled", "torch")
    comparison = parity.Comparison(sides=sides, presets=("lozo", "mezo"), parts=("trajectories",))
    asked = {(case["preset"], case["runtime"]) for case in comparison.cases()}
    assert asked == {*(("lozo", side) for side in sides), ("mezo", "vllm"), ("mezo", "torch")}


def test_the_longer_result_counts_and_the_first_probes_are_compared() -> None:
    def result(side: Side, values: list[float]) -> Result:
        case = {"what": "probes", "model": "m", "eps": 1e-3, "probes": len(values), **vars(side)}
        figures = {"clean": values, "plus": values, "minus": [0.5 * value for value in values]}
        return Result("parity", case, figures, {})

    long, short = [1.0, 2.0, 3.0], [1.0, 2.0]
    results = [result(Side(), long), result(Side(), short), result(Side("oracle"), short)]
    (table,) = parity_report.tables(results)
    (row,) = table.rows
    assert (row["probes"], row["clean"], row["equal signs"]) == (2, 0.0, 1.0)


def test_agreement_is_that_of_its_definition() -> None:
    found = parity_report.agreement([1.0, -2.0, 3.0], [1.0, 2.0, 3.0])
    assert found["equal signs"] == pytest.approx(2 / 3)
    assert found["rms of coefficients"] == pytest.approx(np.sqrt(16 / 14))
    assert found["correlation"] == pytest.approx(np.corrcoef([1, -2, 3], [1, 2, 3])[0, 1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parts": ("runtime",)}, "Did you mean 'runtimes'"),
        ({"sides": ("orakel",)}, "unknown side"),
        ({"presets": ("lozzo",)}, "Did you mean 'lozo'"),
        ({"dtypes": ("int8",)}, "unknown dtype"),
        ({"scope": "some"}, "unknown scope"),
        ({"eps": 0.0}, "must be positive"),
        ({"probes": 0}, "at least 1"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        measure(tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("model", "said"), [("nowhere", "nowhere"), ("tiny:lama", "Did you mean 'llama'")])
def test_a_model_that_is_not_there_is_a_mistake_and_no_result(tmp_path: Path, model: str, said: str) -> None:
    options: dict[str, Any] = {"parts": ("runtimes",), "sides": ("torch",), "dtypes": ("float32",)}
    with pytest.raises(ModelError, match=said):
        measure(tmp_path, **options | {"models": ("tiny:llama", model)})
    assert not list(tmp_path.iterdir())


def test_the_command_prints_tables_and_one_line(tmp_path: Path) -> None:
    words = "--models tiny:opt --parts runtimes --sides oracle,torch --dtypes float32 --probes 2 --batch-size 2"
    command = ["bench", "parity", "--out", str(tmp_path), "--threads", "1", *words.split()]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert "| torch | float32 | oracle | 2 |" in done.stdout
    (line,) = CliRunner().invoke(cli.app, [*command, "--json"]).stdout.splitlines()
    assert json.loads(line)["tables"][0]["rows"][0]["runtime"] == "torch"
