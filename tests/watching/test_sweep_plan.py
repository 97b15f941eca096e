"""What a sweep's file plans: grids, listed runs and their names; nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zotune.errors import ConfigError
from zotune.watching import sweep
from zotune.watching.sweep.plan import names

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALLEST = '[base.model]\npath = "m"\n[base.data]\ntrain = "rows.jsonl"\n'


def read(folder: Path, text: str, output: str | None = None) -> sweep.Plan:
    file = folder / "sweep.toml"
    file.write_text((f'output = "{folder}/runs"\n' if output is None else output) + text, encoding="utf-8")
    return sweep.read(file)


def test_a_grid_is_every_combination_in_order(tmp_path: Path) -> None:
    plan = read(tmp_path, '[grid]\n"method.lr" = [1e-5, 3e-5]\ntrain.seed = [0, 1, 2]\n' + SMALLEST)
    assert [run.name for run in plan.runs] == [f"lr={lr},seed={seed}" for lr in ("1e-05", "3e-05") for seed in range(3)]
    assert plan.keys == ("method.lr", "train.seed")
    assert (plan.runs[4].config.method.lr, plan.runs[4].config.train.seed) == (3e-5, 1)
    assert plan.runs[4].path == tmp_path / "runs" / "lr=3e-05,seed=1"
    assert not (tmp_path / "runs").exists()


def test_listed_runs_stand_alone_or_are_combined_with_the_grid(tmp_path: Path) -> None:
    listed = '[[run]]\nmethod.preset = "lozo-m"\n[[run]]\nmethod = {preset = "mezo", lr = 1e-7}\n'
    plan = read(tmp_path, listed + SMALLEST)
    assert [run.name for run in plan.runs] == ["preset=lozo-m", "preset=mezo,lr=1e-07"]
    assert [run.name for run in read(tmp_path, "[[run]]\n" + listed + SMALLEST).runs] == [
        "base",
        "preset=lozo-m",
        "preset=mezo,lr=1e-07",
    ]
    apart = read(
        tmp_path, "[[run]]\nmethod.lr = 1e-7\n[[run]]\ntrain.seed = 1\n" + SMALLEST + "[base.method]\neps = 0.5\n"
    )
    assert [(run.config.method.lr, run.config.train.seed) for run in apart.runs] == [(1e-7, 0), ("auto", 1)]
    both = read(tmp_path, listed + "[grid]\ntrain.seed = [0, 1]\n" + SMALLEST)
    assert [run.name for run in both.runs] == [
        "preset=lozo-m,seed=0", "preset=lozo-m,seed=1", "preset=mezo,lr=1e-07,seed=0", "preset=mezo,lr=1e-07,seed=1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALLEST, "nothing varies"),
        ("[grid]\ntrain.seed = 3\n" + SMALLEST, r"grid\.train\.seed must be a list"),
        ("[grid]\ntrain.seed = []\n" + SMALLEST, r"grid\.train\.seed must be a list of values with one at least"),
        ("[grid]\ntrain.sede = [1]\n" + SMALLEST, r"run sede=1: unknown key 'train\.sede'. Did you mean 'train\.seed'"),
        ("[grid]\ntrain.steps = [1, 0]\n" + SMALLEST, r"run steps=0: train\.steps"),
        ('[grid]\nmethod.preset = ["lozzo"]\n' + SMALLEST, "unknown preset 'lozzo'"),
        ('[grid]\noutput = ["a", "b"]\n' + SMALLEST, "output cannot vary"),
        ("[grid]\ntrain.seed = [0, 0]\n" + SMALLEST, "seed=0.* and seed=0.* are the same run"),
        ("[grid]\ntrain.seed = [0]\n[[run]]\ntrain.seed = 1\n" + SMALLEST, r"train\.seed is set in \[grid\] and in"),
        (
            "[[run]]\nmethod.lr = 1e-3\n[grid]\nmethod = [{lr = 1e-5}, {lr = 1e-4}]\n" + SMALLEST,
            r"method\.lr is set in \[grid\] and in",
        ),
        (
            '[grid]\nmethod = [{lr = 1e-5}]\n"method.lr" = [1e-4]\n' + SMALLEST,
            r"method\.lr is set .* or twice",
        ),
        ('base = "nowhere.toml"\n[grid]\ntrain.seed = [0]\n', r"cannot read the configuration nowhere\.toml"),
        ("[grid]\ntrain.seed = [0]\n", "base is required"),
        ("gird = 1\n" + SMALLEST, "unknown key 'gird'. Did you mean 'grid'"),
        ("grid = 1\n" + SMALLEST, r"grid is a table, \[grid\]"),
        ("run = 1\n" + SMALLEST, r"runs are listed as \[\[run\]\]"),
        ("run = [1]\n" + SMALLEST, r"runs are listed as \[\[run\]\]"),
        ("[[run]]\n[[run]]\n" + SMALLEST, "base.* and base.* are the same run"),
        ("[[run]]\n[[run]]\ntrain.seed = 0\n" + SMALLEST, "base and seed=0 are the same run"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.toml"]


def test_what_all_runs_have_in_common_does_not_vary(tmp_path: Path) -> None:
    plan = read(tmp_path, "[grid]\ntrain.seed = [0, 1]\ntrain.steps = [7]\n" + SMALLEST)
    assert plan.keys == ("train.seed",)
    assert [run.config.train.steps for run in plan.runs] == [7, 7]


@pytest.mark.parametrize("output", ["", 'output = ""\n', "output = 3\n"])
def test_a_sweep_needs_a_folder(tmp_path: Path, output: str) -> None:
    with pytest.raises(ConfigError, match="output is required"):
        read(tmp_path, "[grid]\ntrain.seed = [0]\n" + SMALLEST, output)


def test_keys_that_vary_together_are_tables_and_change_nothing_else(tmp_path: Path) -> None:
    grid = '[grid]\nmethod = [{preset = "mezo"}, {preset = "lozo", interval = 5}]\n"method.lr" = [1e-5, 1e-4]\n'
    plan = read(tmp_path, grid + SMALLEST + "[base.method]\neps = 0.5\n")
    assert [run.name for run in plan.runs] == [
        "preset=mezo,lr=1e-05", "preset=mezo,lr=0.0001",
        "preset=lozo,interval=5,lr=1e-05", "preset=lozo,interval=5,lr=0.0001",
    ]  # fmt: skip
    assert [run.config.method.lr for run in plan.runs] == [1e-5, 1e-4, 1e-5, 1e-4]
    assert {run.config.method.eps for run in plan.runs} == {0.5}


values = st.one_of(
    st.booleans(), st.integers(0, 9), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=120),
    st.lists(st.text(max_size=5), max_size=3),
)  # fmt: skip
points = st.lists(
    st.dictionaries(st.sampled_from(["method.lr", "train.seed", "model.path", "data.path"]), values),
    max_size=6, unique_by=lambda point: json.dumps(point, sort_keys=True),
)  # fmt: skip


@given(points)
@example([{"train.seed": 1}, {"train.seed": "1"}])
@example([{"model.path": "Llama"}, {"model.path": "llama"}])
@example([{"model.path": "m" * 96}])
def test_names_are_different_and_fit_for_any_file_system(chosen: list[dict[str, Any]]) -> None:
    found = names(chosen)
    assert len({name.casefold() for name in found}) == len(chosen)
    for name in found:
        assert 0 < len(name) <= 100
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,=+-_")
        assert name[0] not in ".-"
    assert dict(zip(map(str, reversed(chosen)), names(chosen[::-1]), strict=True)) == dict(
        zip(map(str, chosen), found, strict=True)
    ), "a name must not depend on the order"


def test_a_name_has_the_words_of_what_is_set() -> None:
    assert names([{"data.label": ""}, {"data.label": "is it (sad)?"}, {}]) == ["label=empty", "label=is-it-sad", "base"]


@pytest.mark.parametrize("path", sorted((EXAMPLES / "sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_an_example_is_a_sweep(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    plan = sweep.read(path)
    assert len(plan.runs) == 6
    assert f"zotune sweep examples/sweeps/{path.name}" in path.read_text()
