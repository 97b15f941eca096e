from __future__ import annotations

import json
import tomllib
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zotune import config
from zotune.config import Config, DataConfig, MethodConfig, ModelConfig, RuntimeConfig, TrainConfig
from zotune.errors import ConfigError

MINIMAL: dict[str, Any] = {"output": "runs/a", "model": {"path": "some/model"}, "data": {"train": "rows.jsonl"}}

text = st.text(min_size=1)
positive = st.integers(min_value=1, max_value=10**12)
rates = st.floats(min_value=0, max_value=1e9)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


configs = st.builds(
    Config,
    output=text,
    model=st.builds(ModelConfig, path=text, revision=optional(text), dtype=st.sampled_from(["auto", "bfloat16"])),
    data=st.builds(
        DataConfig,
        task=st.none(),
        train=optional(text),
        prompt=optional(text),
        candidates=optional(st.lists(text)),
        fields=optional(st.dictionaries(text, text, max_size=2)),
        train_size=optional(positive),
        bos=st.sampled_from(["tokenizer", "none", 0, 2]),
    ),
    method=st.builds(
        MethodConfig, preset=st.just("lozo"), lr=st.just("auto") | rates, rank=optional(st.integers(1, 4096))
    ),
    train=st.builds(TrainConfig, steps=positive, seed=positive),
    runtime=st.builds(
        RuntimeConfig, fold=st.sampled_from(["stochastic", "master"]), threads=optional(st.integers(1, 512))
    ),
)


def changed(**tables: Any) -> dict[str, Any]:
    """The minimal configuration with some tables' keys replaced."""
    result = dict(MINIMAL)
    for name, values in tables.items():
        result[name] = {**result.get(name, {}), **values} if isinstance(values, dict) else values
    return result


def refusal(table: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        config.parse(table, source="my.toml")
    return str(caught.value)


@given(configs)
def test_what_is_dumped_loads_back_equal(original: Config) -> None:
    assert config.parse(tomllib.loads(config.dump(original))) == original


def test_a_file_keeps_every_odd_character(tmp_path: Path) -> None:
    odd = 'quote " backslash \\ newline \n return \r tab \t delete \x7f emoji \N{GRINNING FACE} nul \0 separator \u2028'
    original = config.parse(changed(output=odd, data={"prompt": odd, "candidates": [odd]}))
    path = tmp_path / "config.toml"
    path.write_text(config.dump(original), encoding="utf-8")
    assert config.load(path) == original


def test_defaults_fill_what_is_left_out() -> None:
    parsed = config.parse(MINIMAL)
    assert (parsed.method.preset, parsed.train.batch_size, parsed.runtime.fold) == ("lozo", 16, "stochastic")


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (changed(train={"step": 3}), "my.toml: unknown key 'train.step'. Did you mean 'train.steps'? Known: train."),
        (changed(modle={}), "unknown key 'modle'. Did you mean 'model'?"),
        (changed(lr=1e-6), "unknown key 'lr'. Did you mean 'method.lr', in the table [method]?"),
        (changed(train={"lr": 1e-6}), "unknown key 'train.lr'. Did you mean 'method.lr', in the table [method]?"),
        (
            changed(runtime={"vllm": {"compil": True}}),
            "unknown key 'runtime.vllm.compil'. Did you mean 'runtime.vllm.compile'? Known: runtime.vllm.adapters,",
        ),
        (changed(runtime={"vlm": {"compile": True}}), "unknown key 'runtime.vlm'. Did you mean 'runtime.vllm'?"),
        (changed(runtime={"replicas": 3}), "Did you mean 'runtime.ray.replicas', in the table [runtime.ray]?"),
        (changed(runtime={"patience": 3}), "unknown key 'runtime.patience'. Did you mean 'runtime.ray.patience', in"),
        (changed(patience=3), "unknown key 'patience'. Did you mean 'train.patience', in the table [train]?"),
        (changed(compile=True), "unknown key 'compile'. Did you mean 'runtime.vllm.compile', in the table"),
        (changed(runtime={"ray": {"replicas": 0}}), "runtime.ray.replicas: Input should be greater than or equal to 1"),
        (changed(runtime={"ray": 3}), "runtime.ray is a table: write [runtime.ray] and its keys below (got 3)"),
        (changed(data={"candidates": ["a", 3]}), "my.toml: data.candidates.1: must be text (got 3)"),
        (changed(data={"fields": {"a": 3}}), "my.toml: data.fields.a: must be text (got 3)"),
        (changed(output=""), "output: String should have at least 1 character (got '')"),
        (changed(model={"path": ""}), "model.path: String should have at least 1 character (got '')"),
        (changed(train={"steps": 0}), "train.steps: Input should be greater than or equal to 1 (got 0)"),
        (changed(method={"lr": float("inf")}), "method.lr: must be 'auto' or a number from 0 to 1e38 (got inf)"),
        (changed(model={"dtype": "bf16"}), "'auto', 'float32', 'bfloat16' or 'float16' (got 'bf16')"),
        (changed(train=3), "train is a table: write [train] and its keys below (got 3)"),
        ({"output": "runs/a", "data": {}}, "model is required"),
        ({**MINIMAL, "model": {}}, "model.path is required"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(table: dict[str, Any], expected: str) -> None:
    assert expected in refusal(table)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (changed(method={"lr": True}), "method.lr: must be 'auto' or a number from 0 to 1e38 (got True)"),
        (changed(method={"lr": "1e-4"}), "method.lr: must be 'auto' or a number from 0 to 1e38 (got '1e-4')"),
        (changed(method={"eps": True}), "method.eps: must be a number (got True)"),
        (changed(method={"interval": True}), "method.interval: must be a whole number (got True)"),
        (changed(method={"calibrated": 1}), "method.calibrated: must be true or false (got 1)"),
        (changed(train={"steps": True}), "train.steps: must be a whole number (got True)"),
        (changed(train={"steps": 10.0}), "train.steps: must be a whole number (got 10.0)"),
        (
            changed(train={"steps": "10"}),
            "train.steps: must be a whole number, in TOML's notation and without quotes (got '10')",
        ),
        (changed(train={"seed": True}), "train.seed: must be a whole number (got True)"),
        (changed(data={"bos": True}), "data.bos: must be 'tokenizer', 'none' or a token id (got True)"),
        (changed(data={"chat": 1}), "data.chat: must be true or false (got 1)"),
        (changed(data={"candidates": "ab"}), "data.candidates: must be a list (got 'ab')"),
        (changed(data={"prompt": 3}), "data.prompt: must be text (got 3)"),
        (changed(runtime={"vllm": {"compile": 1}}), "runtime.vllm.compile: must be true or false (got 1)"),
        (changed(runtime={"ray": {"gpus": True}}), "runtime.ray.gpus: must be a whole number (got True)"),
    ],
)
def test_a_value_of_another_type_is_refused(table: dict[str, Any], expected: str) -> None:
    assert refusal(table) == f"my.toml: {expected}"


def taking(value: float) -> set[str]:
    """The keys that may have this number."""
    taken = set()
    for name, table in config.tables().items():
        for key in table.model_fields:
            given = deepcopy(MINIMAL)
            config.assign(given, f"{name}.{key}", value)
            with suppress(ConfigError):
                config.parse(given)
                taken.add(f"{name}.{key}")
    return taken


def test_numbers_have_bounds() -> None:
    # A token id is checked where the vocabulary is known.
    assert taking(-1) == {"data.bos"}
    rates = {f"method.{key}" for key in ("lr", "momentum", "weight_decay", "warmup_steps")} | {"train.min_delta"}
    counts = {"train.seed", "data.split_seed", "runtime.vllm.bank_rank", "runtime.ray.gpus"}
    assert taking(0) == {"data.bos", *rates, *counts}
    assert "method.momentum" not in taking(1), "which would be no step at all"
    rows = {"bos", "train_size", "validation_size", "split_seed", "max_length"}
    steps = {"steps", "eval_every", "patience", "checkpoint_every", "keep_checkpoints", "max_skipped"}
    others = {"method.interval", "method.warmup_steps", "runtime.max_tokens"}
    cuts = {"runtime.ray.unit_tokens", "runtime.ray.check_every"}
    assert taking(10**39) == {f"data.{key}" for key in rows} | {f"train.{key}" for key in steps} | others | cuts


@pytest.mark.parametrize(
    ("runtime", "columns"),
    [
        ({"type": "torch"}, 0),
        ({"type": "vllm"}, 4),
        ({"type": "ray"}, 0),
        ({"type": "ray", "ray": {"inner": "vllm"}}, 4),
    ],
)
def test_only_a_runtime_on_vllm_has_a_bank(runtime: dict[str, Any], columns: int) -> None:
    assert config.parse(changed(runtime={**runtime, "vllm": {"bank_rank": 4}})).runtime.bank == columns


def test_a_whole_number_is_also_a_number_and_a_tuple_also_a_list() -> None:
    table = changed(
        method={"lr": 1, "eps": np.float64(0.5)}, train={"seed": np.int64(3)}, data={"candidates": (" no", " yes")}
    )
    parsed = config.parse(MappingProxyType(table | {"model": MappingProxyType(table["model"])}))
    assert (parsed.method.lr, parsed.method.eps, parsed.train.seed) == (1.0, 0.5, 3)
    assert parsed.data.candidates == [" no", " yes"]
    assert config.parse(tomllib.loads(config.dump(parsed))) == parsed


def test_json_keeps_a_configuration() -> None:
    original = config.parse(changed(method={"lr": 1e-3}, data={"bos": 0, "fields": {"a": "b"}}))
    assert config.parse(json.loads(original.model_dump_json())) == original


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(config.dump(config.parse(MINIMAL)), encoding="utf-8-sig")
    assert config.load(path) == config.parse(MINIMAL)


def test_each_mistake_gets_one_line() -> None:
    lines = refusal(changed(data={"bos": "first"}, train={"steps": 0, "seed": -1})).splitlines()
    assert len(lines) == 3
    assert "my.toml: data.bos: must be 'tokenizer', 'none' or a token id (got 'first')" in lines


@pytest.mark.parametrize("given", [None, "my.toml", 3, ["output"]])
def test_what_is_no_table_at_all_is_one_line(given: Any) -> None:
    assert refusal(given) == f"my.toml: must be a table of keys, as output and model are, and not {given!r}"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        config.load(tmp_path)


@pytest.mark.parametrize("content", [b"output = ", b"output = '\xff'"])
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not valid TOML"):
        config.load(path)


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(config.dump(config.parse(MINIMAL)))
    overrides = [
        "train.steps=7",
        "method.lr = 3e-5",
        "output=runs/b",
        'data.candidates=["no", "yes"]',
        "model.path=x=y",
    ]
    loaded = config.load(path, overrides)
    assert (loaded.train.steps, loaded.method.lr, loaded.output) == (7, 3e-5, "runs/b")
    assert (loaded.data.candidates, loaded.model.path) == (["no", "yes"], "x=y")


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("train.steps", "section.key=value"),
        ("=3", "section.key=value"),
        ("output.name=3", "'output' is not a table"),
        ("train.stesp=3", "Did you mean 'train.steps'"),
        ("train.steps=many", "train.steps"),
        ("runtime.vllm.compil=true", "unknown key 'runtime.vllm.compil'. Did you mean 'runtime.vllm.compile'?"),
    ],
)
def test_an_override_that_makes_no_sense(tmp_path: Path, assignment: str, expected: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(config.dump(config.parse(MINIMAL)))
    with pytest.raises(ConfigError) as caught:
        config.load(path, [assignment])
    assert expected in str(caught.value)
