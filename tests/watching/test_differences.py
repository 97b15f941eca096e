from __future__ import annotations

from typing import Any

from zotune import config
from zotune.run import resolved
from zotune.watching import differences


def values(**tables: Any) -> dict[str, Any]:
    table: dict[str, Any] = {"output": "runs/a", "model": {"path": "some/model"}, "data": {"train": "rows.jsonl"}}
    return differences.values(resolved(config.parse(table | tables)))


def test_what_differs_is_named_and_where_a_run_lies_is_not() -> None:
    a, b = values(method={"lr": 1e-5}), values(output="runs/b", method={"lr": 3e-5}, train={"seed": 1})
    assert differences.differing([a, b]) == ["method.lr", "train.seed"]
    assert differences.labels(["a", "b"], [a, b]) == ["lr 1e-05, seed 0", "lr 3e-05, seed 1"]
    assert differences.differing([a, a]) == []


def test_a_preset_tells_more_than_the_values_it_brings() -> None:
    lozo, mezo = values(method={"preset": "lozo"}), values(method={"preset": "mezo"})
    assert differences.differing([lozo, mezo]) == ["method.preset"]
    own = values(method={"preset": "mezo", "lr": 0.5})
    assert differences.differing([lozo, own]) == ["method.preset", "method.lr"]


def test_a_task_tells_more_than_the_values_it_brings() -> None:
    tasks = [values(data={"task": name}) for name in ("sst2", "rte")]
    assert differences.differing(tasks) == ["data.task"]


def test_runs_whose_configurations_do_not_tell_them_apart_keep_their_names() -> None:
    a, b = values(), values(train={"seed": 1})
    assert differences.labels(["a", "b"], [a, a]) == ["a", "b"]
    assert differences.labels(["a", "b", "c"], [a, a, b]) == ["a (seed 0)", "b (seed 0)", "seed 1"]
    long = values(data={"train": "rows.jsonl", "prompt": "{text} " * 20})
    assert differences.labels(["a", "b"], [a, long]) == ["prompt None", "b"]


def test_a_short_name_is_the_last_part_unless_two_keys_share_it() -> None:
    short = differences.short_names(["method.lr", "model.path", "other.path"])
    assert short == {"method.lr": "lr", "model.path": "model.path", "other.path": "other.path"}


def test_values_are_shown_short() -> None:
    shown = [
        differences.shown(value) for value in (1e-5, 3, True, None, "/data/a/rows.jsonl", "org/model", [1e-3, "b"])
    ]
    assert shown == ["1e-05", "3", "true", "None", "rows.jsonl", "org/model", "0.001, b"]


def test_values_that_would_look_the_same_are_shown_whole() -> None:
    assert differences.shown_apart(["/a/model", "/b/model", "/b/other", "/a/model", 0.1, 0.1]) == [
        "/a/model", "/b/model", "other", "/a/model", "0.1", "0.1",
    ]  # fmt: skip


def test_flatten_joins_keys_with_dots() -> None:
    assert differences.flatten({"a": {"b": 1, "c": {"d": 2}}, "e.f": 3, "g": {}}) == {"a.b": 1, "a.c.d": 2, "e.f": 3}
