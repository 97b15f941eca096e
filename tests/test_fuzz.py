"""Whatever configurations, rows, journals and checkpoints hold: a result or an error of ours, and nothing is harmed."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_runs import Recorder, assert_same, contents, saved
from torch import Tensor
from typer.testing import CliRunner, Result

import zotune
from zotune import cli, config
from zotune.cli.program import USER_ERROR
from zotune.config import Config, Section
from zotune.errors import ZotuneError

SECONDS = 60
"""What no command on the tiny model may take, however busy the machine is."""

NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 5, 8, 63, 64, 65, 2**31, 2**63, 2**70]) | st.integers(0, 9)
SCALARS = (
    NUMBERS
    | st.sampled_from([0.0, 1e-3, 0.5, -0.1, 1e38, 1e308, float("inf"), float("nan")])
    | st.booleans()
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
WORDS = st.sampled_from(
    ["the", "film", "fine", "dull", " ", "\n", "{", "}", "{text}", "{label}", "é", "\x00", "\u2028"]
)
TEXTS = st.lists(WORDS, max_size=6).map(" ".join) | st.text(max_size=20)


@dataclass
class World:
    """Where the fuzzed commands work.

    Attributes:
        folder: Inputs, and what is to stay as it is.
        chosen: A configuration of two steps that works, into ``folder / "run"``.
        files: All that was there before.
        finished: A finished run of six steps.
        weights: Its newest checkpoint.
    """

    folder: Path
    chosen: Config
    files: dict[str, bytes]
    finished: Path
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]
) -> Iterator[World]:
    import huggingface_hub.constants

    folder = tmp_path_factory.mktemp("world")
    finished = tmp_path_factory.mktemp("finished") / "run"
    (folder / "other").mkdir()
    (folder / "other" / "notes.txt").write_text("mine")
    model = shutil.copytree(tiny_model_folder, folder / "model")
    chosen = tiny_runs.configure(folder, model, sentiment_files, train={"steps": 2}, data={"validation_size": 8})
    train = {"steps": 6, "checkpoint_every": 2}
    longer = chosen.model_copy(update={"output": str(finished), "train": chosen.train.model_copy(update=train)})
    zotune.start(longer, Recorder())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.chdir(folder)
        yield World(folder, chosen, contents(folder), finished, saved(finished))


@contextmanager
def in_time() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"it has worked for more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def invoke(*words: object) -> Result:
    """A command that succeeds or says in its own words why it does not."""
    with in_time():
        result = CliRunner().invoke(cli.app, [str(word) for word in words])
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    assert result.exit_code in (0, USER_ERROR), result.output
    if result.exit_code == USER_ERROR:
        assert "rror" in result.stderr
        assert "Traceback" not in result.output
    return result


def assert_nothing_else_changed(world: World) -> None:
    """Only the run directory may be new; it is removed."""
    shutil.rmtree(world.folder / "run", ignore_errors=True)
    assert contents(world.folder) == world.files
    assert {path.name for path in world.folder.iterdir() if path.is_dir()} == {"model", "other"}


# Configurations


def _keys() -> st.SearchStrategy[tuple[str, str]]:
    tables = {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    known = [(table, key) for table, section in tables.items() for key in section.model_fields]
    return st.sampled_from(known) | st.tuples(st.sampled_from([*tables, "x"]), st.text(max_size=5))


PATHS = st.sampled_from(
    ["model", "other", "other/notes.txt", "train.jsonl", "no/such", "/", ".", "", "~", "a:b", "\x00"]
)
SIZES = st.sampled_from(
    [
        *(("method", key) for key in ("lr", "eps", "rank", "interval", "directions", "weight_decay", "warmup_steps")),
        *(
            ("train", key)
            for key in ("batch_size", "seed", "eval_every", "eval_minutes", "patience", "checkpoint_every")
        ),
        *(("data", key) for key in ("train_size", "validation_size", "split_seed", "max_length", "bos")),
        *(("runtime", key) for key in ("max_tokens", "threads")),
    ]
)
PRESETS = st.sampled_from(["lozo", "lozo-m", "mezo", "mezo-factorized", "mezo-lora"])
CHANGES = st.lists(
    st.tuples(SIZES, NUMBERS | st.sampled_from([0.0, 1e-308, 1e-3, 0.5, 1e38, 1e308]))
    | st.tuples(SIZES, NUMBERS)
    | st.tuples(st.just(("method", "preset")), PRESETS)
    | st.tuples(_keys(), VALUES)
    | st.tuples(st.sampled_from([("data", "train"), ("data", "validation"), ("model", "path")]), PATHS)
    | st.tuples(st.sampled_from([("data", "prompt"), ("data", "completion"), ("data", "label")]), TEXTS)
    | st.tuples(st.just(("data", "candidates")), st.lists(TEXTS, max_size=3)),
    min_size=1,
    max_size=3,
)


def configurations(world: World, draw: st.DataObject) -> None:
    """A configuration with a few odd values, or any bytes, or odd settings on the command line."""
    path = world.folder.parent / "odd.toml"
    table = world.chosen.model_dump(exclude_none=True)
    for (section, key), value in draw.draw(CHANGES):
        if (section, key) != ("train", "steps"):
            table.setdefault(section, {})[key] = value
    text = "\n".join(
        f"output = {config._toml(values)}"
        if name == "output"
        else "\n".join([f"[{name}]", *(f"{config._toml(key)} = {_toml(value)}" for key, value in values.items())])
        for name, values in table.items()
    )
    kind = draw.draw(st.sampled_from(["tables"] * 6 + ["bytes", "cut", "settings"]))
    raw = text.encode("utf-8", "surrogatepass")
    if kind == "bytes":
        raw = draw.draw(st.binary(max_size=200))
    if kind == "cut":
        raw = mutated(raw, draw)
    path.write_bytes(raw)
    odd = draw.draw(st.lists(TEXTS, max_size=2)) if kind == "settings" else []
    words = [word for setting in odd for word in ("--set", setting)]
    # Last, so that it holds whatever came before.
    result = invoke("run", path, "--set", "train.steps=2", *words, "--set", f"output={json.dumps(world.chosen.output)}")
    assert result.exit_code == 0 or not (world.folder / "run").exists() or "not finite" in result.stderr
    assert_nothing_else_changed(world)


def _toml(value: Any) -> str:
    """TOML of a value, with its names for numbers that JSON lacks; what TOML cannot say is refused as JSON."""
    if isinstance(value, float):
        return repr(value)
    return config._toml(value) if not isinstance(value, list) else f"[{', '.join(map(_toml, value))}]"


# Rows

RECORDS = st.dictionaries(st.sampled_from(["text", "label", "x", "idx"]), VALUES, max_size=3) | st.fixed_dictionaries(
    {"text": TEXTS | VALUES, "label": st.sampled_from([0, 1, "great", " great", "1", True, 1.0, 2, None]) | VALUES}
)


def data_files(world: World, draw: st.DataObject) -> None:
    """Any rows in any of the forms that are read, some of them torn."""
    suffix = draw.draw(st.sampled_from([".jsonl"] * 4 + [".json", ".csv", ".parquet", ".txt", ""]))
    path = world.folder.parent / f"rows{suffix}"
    rows = draw.draw(st.lists(RECORDS, max_size=4))
    good = (world.folder / "train.jsonl").read_bytes()
    raw = draw.draw(
        st.sampled_from(
            [
                "\n".join(json.dumps(row) for row in rows).encode(),
                good + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8", "surrogatepass"),
                "\n".join(",".join(map(str, row.values())) for row in rows).encode("utf-8", "surrogatepass"),
                "\n".join(json.dumps(row) for row in rows).encode("utf-16"),
                json.dumps(rows).encode(),
                b"PAR1" + good[:50] + b"PAR1",
            ]
        )
        | st.binary(max_size=100)
    )
    path.write_bytes(mutated(raw, draw) if raw and draw.draw(st.booleans()) else raw)
    settings = {
        "train": str(path) if draw.draw(st.booleans()) else str(world.chosen.data.train),
        "validation": str(path) if draw.draw(st.booleans()) else str(world.chosen.data.validation),
    }
    if draw.draw(st.booleans()):
        settings = {"train": str(path), "validation": None}
    if draw.draw(st.integers(0, 3)) == 0:
        settings |= {"candidates": None, "label": None, "completion": draw.draw(TEXTS)}
    data = world.chosen.data.model_copy(update=settings)
    file = world.folder.parent / "rows.toml"
    file.write_text(config.dump(world.chosen.model_copy(update={"data": data})))
    before = path.read_bytes()
    invoke("run", file, "--json")
    assert path.read_bytes() == before
    assert_nothing_else_changed(world)
    path.unlink()


# Journals and checkpoints


def mutated(raw: bytes, draw: st.DataObject) -> bytes:
    """Bytes with a piece lost, doubled, changed or put in, or cut off."""
    at = draw.draw(st.integers(0, max(0, len(raw) - 1)))
    size = draw.draw(st.sampled_from([1, 1, 2, 10, 200]))
    kind = draw.draw(st.sampled_from(["flip", "flip", "cut", "lose", "double", "insert", "zero", "swap lines"]))
    head, piece, tail = raw[:at], raw[at : at + size], raw[at + size :]
    if kind == "flip":
        return head + bytes(byte ^ 1 << draw.draw(st.integers(0, 7)) for byte in piece[:1]) + piece[1:] + tail
    if kind == "swap lines":
        lines = raw.splitlines(keepends=True)
        order = draw.draw(st.permutations(range(len(lines)))) if len(lines) < 20 else [*range(len(lines))][::-1]
        return b"".join(lines[i] for i in order)
    made = {
        "cut": head,
        "lose": head + tail,
        "double": head + piece + piece + tail,
        "zero": head + bytes(len(piece)) + tail,
    }
    return made[kind] if kind in made else head + draw.draw(st.binary(max_size=20)) + piece + tail


def damaged(world: World, draw: st.DataObject, file: Callable[[Path], Path]) -> tuple[ZotuneError | None, Path]:
    """A copy of the finished run with one file damaged, looked at in some way and then resumed: the error, if any."""
    run = world.folder / "run"
    shutil.copytree(world.finished, run)
    path = file(run)
    for _ in range(draw.draw(st.integers(1, 2))):
        path.write_bytes(mutated(path.read_bytes(), draw))
    before = contents(run)
    look = draw.draw(st.sampled_from([None, None, None, None, "eval", "plot"]))
    if look:
        invoke(look, run)
    (run / "curves.png").unlink(missing_ok=True)
    assert contents(run) == before, "looking changes nothing"
    try:
        with in_time():
            zotune.resume(run, Recorder())
    except ZotuneError as error:
        assert contents(run) == before, "what cannot go on stays as it is"
        return error, run
    return None, run


def journals(world: World, draw: st.DataObject) -> None:
    """A run that goes on after its journal was damaged comes to the bits that it had."""
    error, run = damaged(world, draw, lambda run: run / "journal.jsonl")
    if error is None:
        assert (run / "journal.jsonl").read_bytes() == (world.finished / "journal.jsonl").read_bytes()
        assert_same(saved(run), world.weights)
    assert_nothing_else_changed(world)


def checkpoints(world: World, draw: st.DataObject) -> None:
    """A run with damaged checkpoints always goes on, to the bits that it had."""
    names = ("state.safetensors", "checkpoint.json")
    step, name = draw.draw(st.tuples(st.sampled_from([4, 6]), st.sampled_from(names)))
    error, run = damaged(world, draw, lambda run: run / "checkpoints" / f"step-{step:08d}" / name)
    assert error is None
    assert_same(saved(run), world.weights)
    assert_nothing_else_changed(world)


def other_files(world: World, draw: st.DataObject) -> None:
    """A run goes on, or says what is wrong, whatever became of its configuration and metrics."""
    name = draw.draw(st.sampled_from(["config.toml", "metrics.jsonl", "predictions.jsonl", "manifest.json"]))
    error, run = damaged(world, draw, lambda run: run / name)
    if error is None and name != "config.toml":
        assert_same(saved(run), world.weights)
    assert_nothing_else_changed(world)


@pytest.mark.parametrize("share", [0.15, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("target", "examples"),
    [(configurations, 500), (data_files, 500), (journals, 450), (checkpoints, 350), (other_files, 200)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_there_is_a_result_or_an_error_of_ours(
    world: World, target: Callable[[World, st.DataObject], None], examples: int, share: float
) -> None:
    @settings(
        max_examples=round(share * examples),
        derandomize=share < 1,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def fuzz(draw: st.DataObject) -> None:
        shutil.rmtree(world.folder / "run", ignore_errors=True)
        target(world, draw)

    fuzz()
