"""Bad input: one clear message, and nothing that existed is changed."""

from __future__ import annotations

import gzip
import json
import random
import resource
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_runs
import pytest
from made_runs import MadeRun
from typer.testing import CliRunner

from zotune import cli
from zotune.errors import ConfigError, JournalError, ModelError, ZotuneError
from zotune.export import apply_journal, export_run, journal_file

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return made_runs.make(tmp_path_factory.mktemp("made"), "llama", "lozo", scope="linear", lr=1e-3, interval=3)


@pytest.fixture(scope="module")
def file(run: MadeRun) -> Path:
    path = run.path.with_name("run.zotune")
    export_run(run.path, path, "journal")
    return path


def test_an_unknown_format_names_the_nearest(run: MadeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown format 'merge'. Did you mean 'merged'\?"):
        export_run(run.path, tmp_path / "out", "merge")


@pytest.mark.parametrize("format", ["merged", "peft", "journal"])
def test_what_exists_is_left_alone(run: MadeRun, tmp_path: Path, format: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(ConfigError, match=r"out exists and is left as it is"):
        export_run(run.path, tmp_path / "out", format)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize(
    ("format", "name", "value", "own"),
    [
        ("merged", "rank", 4, "peft"),
        ("journal", "max_error", 0.01, "peft"),
        ("peft", "shard_size", "5GB", "merged"),
        ("journal", "shard_size", "5GB", "merged"),
    ],
)
def test_what_a_format_has_no_use_for_is_refused(
    run: MadeRun, tmp_path: Path, format: str, name: str, value: Any, own: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{name} = {value} with format = '{format}'; it belongs to '{own}'"):
        export_run(run.path, tmp_path / "out", format, **{name: value})
    option = f"--{name.replace('_', '-')}"
    words = ["export", str(run.path), "--out", str(tmp_path / "out"), "--format", format, option, str(value)]
    assert CliRunner().invoke(cli.app, words).exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_rank_is_at_least_one(run: MadeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank = 0; a rank is at least 1"):
        export_run(run.path, tmp_path / "out", "peft", rank=0)


def test_a_run_without_steps_has_nothing_to_export(tmp_path: Path) -> None:
    empty = made_runs.make(tmp_path, "llama", "lozo", steps=0)
    with pytest.raises(JournalError, match="no finished step yet"):
        export_run(empty.path, tmp_path / "out")


def test_no_run_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="not a run directory"):
        export_run(tmp_path, tmp_path / "out")


def test_without_peft_the_extra_is_named(run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'zotune\[peft\]'"):
        export_run(run.path, tmp_path / "out", "peft")
    assert list(tmp_path.iterdir()) == []


def test_tuned_lora_matrices_have_their_own_rank(tmp_path: Path) -> None:
    lora = made_runs.make(tmp_path, "llama", "mezo-lora")
    with pytest.raises(ConfigError, match="LoRA matrices of rank 8; leave --rank out"):
        export_run(lora.path, tmp_path / "out", "peft", rank=4)


@pytest.mark.parametrize("size", ["much", "0GB", "-5GB", "infGB", "5", "1001TB"])
def test_a_shard_size_that_is_none_is_refused(run: MadeRun, file: Path, tmp_path: Path, size: str) -> None:
    expected = f"got the shard size '{size}'; allowed is a number above 0, up to 1000, with KB, MB, GB or TB"
    with pytest.raises(ConfigError, match=expected):
        export_run(run.path, tmp_path / "out", shard_size=size)
    with pytest.raises(ConfigError, match=expected):
        apply_journal(str(run.base), file, tmp_path / "out", shard_size=size)
    assert not (tmp_path / "out").exists()


def test_another_base_model_is_refused_by_its_fingerprint(run: MadeRun, file: Path, tmp_path: Path) -> None:
    other = made_runs.make(tmp_path / "other", "llama-tied", "lozo").base
    expected = run.live.fingerprint[:16]
    with pytest.raises(JournalError, match=rf"is not the base model .* in float32, but the journal expects {expected}"):
        apply_journal(str(other), file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_is_not_there_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        apply_journal(str(tmp_path / "nowhere"), file, tmp_path / "out")


def test_a_missing_file_is_refused(run: MadeRun, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"cannot read the journal file .*No such file"):
        apply_journal(str(run.base), tmp_path / "nothing", tmp_path / "out")


def says_the_same(content: bytes, whole: bytes) -> bool:
    """Whether only bits differ that fill up the last byte of what gzip compressed."""
    try:
        return gzip.decompress(content) == gzip.decompress(whole)
    except (OSError, EOFError, zlib.error):
        return False


def test_every_truncation_and_every_flipped_byte_is_noticed(run: MadeRun, file: Path, tmp_path: Path) -> None:
    whole, draw = file.read_bytes(), random.Random(0)
    damaged = [whole[:length] for length in range(0, len(whole), 7)]
    # The header's time, flags and system say nothing of the content, and gzip lets them be.
    for _ in range(100):
        at = draw.randrange(10, len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :])
    damaged += [draw.randbytes(size) for size in (1, 10, 100, 1000)]
    for content in damaged:
        if says_the_same(content, whole):
            continue
        (tmp_path / "damaged").write_bytes(content)
        with pytest.raises(JournalError, match="damaged"):
            apply_journal(str(run.base), tmp_path / "damaged", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize(
    ("preface", "message"),
    [
        ({"version": 2}, "journal file of version 2; this zotune reads version 1"),
        ({"format": "other"}, "is compressed, but holds no journal"),
        ({"facts": {}}, "lacks what a journal file of version 1 has"),
        ({"dtype": 7}, "lacks what a journal file of version 1 has"),
    ],
)
def test_another_preface_is_refused(
    run: MadeRun, file: Path, tmp_path: Path, preface: dict[str, Any], message: str
) -> None:
    first, _, rest = gzip.decompress(file.read_bytes()).partition(b"\n")
    changed = json.dumps(json.loads(first) | preface).encode()
    (tmp_path / "changed").write_bytes(gzip.compress(changed + b"\n" + rest))
    with pytest.raises(JournalError, match=message):
        apply_journal(str(run.base), tmp_path / "changed", tmp_path / "out")


def test_a_preface_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep").write_bytes(gzip.compress(b'{"format":' * 9999))
    with pytest.raises(JournalError, match="is compressed, but holds no journal"):
        apply_journal("nowhere", tmp_path / "deep", tmp_path / "out")


@pytest.mark.parametrize("key", ["dtype", "trust_remote_code", "facts"])
def test_a_preface_that_lacks_something_is_refused(run: MadeRun, file: Path, tmp_path: Path, key: str) -> None:
    first, _, rest = gzip.decompress(file.read_bytes()).partition(b"\n")
    about = {name: value for name, value in json.loads(first).items() if name != key}
    (tmp_path / "changed").write_bytes(gzip.compress(json.dumps(about).encode() + b"\n" + rest))
    with pytest.raises(JournalError, match=f"lacks what a journal file of version 1 has: .*{key}"):
        apply_journal(str(run.base), tmp_path / "changed", tmp_path / "out")


def test_the_revision_is_that_of_the_base_model_which_the_run_had_and_of_no_other(file: Path, tmp_path: Path) -> None:
    first, _, rest = gzip.decompress(file.read_bytes()).partition(b"\n")
    about = json.loads(first)
    about["facts"] |= {"base": "some/model", "revision": "v1"}
    (tmp_path / "changed").write_bytes(gzip.compress(json.dumps(about).encode() + b"\n" + rest))
    found = [journal_file.read(tmp_path / "changed", base).model for base in ("some/model", "another/model")]
    assert [(model.path, model.revision) for model in found] == [("some/model", "v1"), ("another/model", None)]


def test_a_file_does_not_decide_whose_code_is_run(run: MadeRun, file: Path, tmp_path: Path) -> None:
    first, _, rest = gzip.decompress(file.read_bytes()).partition(b"\n")
    changed = json.dumps(json.loads(first) | {"trust_remote_code": True}).encode()
    (tmp_path / "changed").write_bytes(gzip.compress(changed + b"\n" + rest))
    words = ["apply", str(run.base), str(tmp_path / "changed"), "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(cli.app, words)
    assert refused.exit_code == 2
    assert "changed ran modelling code that comes with its checkpoint" in refused.output
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(cli.app, [*words, "--trust-remote-code"]).exit_code == 0
    for trusted in (False, True):
        assert journal_file.read(file, "base", trusted).model.trust_remote_code == trusted


def test_messages_name_the_file_and_not_a_copy(run: MadeRun, file: Path, tmp_path: Path) -> None:
    first, _, rest = gzip.decompress(file.read_bytes()).partition(b"\n")
    (tmp_path / "cut").write_bytes(gzip.compress(first + b"\n" + rest.splitlines(keepends=True)[0]))
    with pytest.raises(JournalError, match=r"cut has no finished step"):
        apply_journal(str(run.base), tmp_path / "cut", tmp_path / "out")
    (tmp_path / "bare").write_bytes(gzip.compress(first + b"\n" + rest[10:]))
    with pytest.raises(JournalError, match=r"bare is not a journal"):
        apply_journal(str(run.base), tmp_path / "bare", tmp_path / "out")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")], ids=repr
)
def test_nothing_is_left_of_an_export_that_fails(
    run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    with pytest.raises(ConfigError, match="out: No space left"):
        export_run(run.path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_programming_error_in_an_export_stays_one(
    run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: object, **kwargs: object) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", wrong)
    with pytest.raises(AttributeError):
        export_run(run.path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def little_room() -> Iterator[None]:
    """No file can be longer than 10 kB, which is less than any weights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "words",
    [("export", "--format", "merged"), ("export", "--format", "peft"), ("replay",)],
    ids=lambda words: words[-1],
)
@pytest.mark.usefixtures("little_room")
def test_weights_that_do_not_fit_are_one_line(run: MadeRun, tmp_path: Path, words: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(cli.app, [words[0], str(run.path), *words[1:], "--out", str(out)])
    assert result.exit_code == 2
    assert f"error: cannot write {out}: Error while serializing: I/O error: File too large" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [("export", "--format", "merged"), ("export", "--format", "journal"), ("replay",)],
    ids=lambda words: words[-1],
)
def test_a_place_below_a_file_is_one_line(run: MadeRun, tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    result = CliRunner().invoke(cli.app, [words[0], str(run.path), *words[1:], "--out", str(out)])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: cannot write {out}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "words",
    [
        ("export", "RUN", "--format", "pef", "--out", "OUT"),
        ("export", "RUN", "--format", "peft", "--rank", "0", "--out", "OUT"),
        ("export", "RUN", "--max-error", "-1", "--out", "OUT"),
        ("export", "RUN"),
        ("apply", "BASE", "RUN", "--out", "OUT"),
    ],
    ids=" ".join,
)
def test_the_program_refuses_in_words(run: MadeRun, tmp_path: Path, words: tuple[str, ...]) -> None:
    names = {"RUN": str(run.path), "BASE": str(run.base), "OUT": str(tmp_path / "out")}
    result = CliRunner().invoke(cli.app, [names.get(word, word) for word in words])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.exception is None or isinstance(result.exception, SystemExit | ZotuneError)
    assert not (tmp_path / "out").exists()


def test_the_program_reports_in_json(run: MadeRun, tmp_path: Path) -> None:
    words = ["export", run.path, "--format", "peft", "--out", tmp_path / "adapter", "--json"]
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    record = json.loads(result.stdout)
    assert (record["format"], record["steps"], record["rank"], record["error"]) == ("peft", 7, 8, 0.0)


def test_the_program_exports_and_applies(run: MadeRun, tmp_path: Path) -> None:
    packed = tmp_path / "run.zotune"
    exported = CliRunner().invoke(cli.app, ["export", str(run.path), "--format", "journal", "--out", str(packed)])
    assert f"{packed}: a journal file of" in exported.stdout
    applied = CliRunner().invoke(cli.app, ["apply", str(run.base), str(packed), "--out", str(tmp_path / "weights")])
    assert "a Hugging Face folder of" in applied.stdout
    assert "7 steps" in applied.stdout
    assert (tmp_path / "weights" / "tokenizer.json").exists()
