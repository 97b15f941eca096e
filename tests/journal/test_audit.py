"""Whether a journal is sound, and where two part; in Python and on the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from tiny_runs import Recorder, contents
from typer.testing import CliRunner, Result

import zotune
from zotune import cli, journal
from zotune.errors import JournalError
from zotune.journal import Entry, Header, audit, records
from zotune.optimizer import Method

HEADER = Header(3, asdict(Method()), 10, 4, "m" * 64, "l" * 64, "d" * 8, "master")
ENTRIES = [Entry(step, (0.5 + step, 0.25), (1.5 * step,), 1e-6, 7) for step in range(6)]


def invoke(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def only_json(result: Result, code: int = 0) -> dict[str, Any]:
    assert result.exit_code == code, result.output
    (line,) = result.stdout.splitlines()
    return json.loads(line, parse_constant=pytest.fail)


def write(path: Path, *lines: Header | Entry | journal.Change) -> Path:
    path.write_bytes(b"".join(map(records.line, lines)))
    return path


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]
) -> Path:
    """A finished run of six steps with checkpoints after three and six."""
    folder = tmp_path_factory.mktemp("trained")
    configure = partial(tiny_runs.configure, folder, tiny_model_folder, sentiment_files)
    tables: dict[str, Any] = {"train": {"steps": 6, "checkpoint_every": 3}, "method": {"interval": 4, "lr": 1e-3}}
    return zotune.start(configure(**tables), Recorder()).path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def damage(path: Path, number: int) -> None:
    """Flip a bit in a line of a journal."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = b"\x20" + lines[number - 1][1:]
    path.write_bytes(b"".join(lines))


def test_a_sound_run(run: Path) -> None:
    before = contents(run)
    size = (run / "journal.jsonl").stat().st_size
    assert audit.verify(run) == audit.Verdict(run / "journal.jsonl", size, 6, (3, 6), (), ())
    shown = invoke("journal", "verify", run)
    assert shown.exit_code == 0
    assert shown.stdout.splitlines() == [
        f"{run / 'journal.jsonl'}: sound, 6 steps, {size} bytes",
        "  sound checkpoints: 3, 6",
    ]
    assert only_json(invoke("journal", "verify", run / "journal.jsonl", "--json"))["sound"] is True
    assert contents(run) == before


def test_damage_is_named_with_what_can_be_recovered_and_repaired(run: Path) -> None:
    damage(run / "journal.jsonl", 5)
    shown = invoke("journal", "verify", run)
    assert shown.exit_code == 1
    assert "not sound, 3 steps" in shown.stdout
    assert "line 5 is damaged: it does not match its checksum; 3 steps before it can be recovered" in shown.stdout
    assert "sound checkpoints: 3, 6" in shown.stdout
    assert f"zotune journal verify {run} --repair" in shown.stdout
    record = only_json(invoke("journal", "verify", run, "--repair", "--json"))
    assert (record["sound"], record["steps"], record["checkpoints"]) == (True, 3, [3])
    assert record["kept"] == str(run / "branches" / "damaged-1")
    assert only_json(invoke("journal", "verify", run, "--repair", "--json"))["kept"] is None


def test_a_torn_last_record_is_worth_knowing_but_not_wrong(run: Path) -> None:
    path = run / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    verdict = audit.verify(run)
    assert (verdict.sound, verdict.steps) == (True, 5)
    assert verdict.notices == (
        "the last record, in line 7, is torn; its step runs again on resume",
        "the checkpoint of step 6 is ahead of the journal",
    )


def test_what_does_not_belong_to_the_run_is_named(run: Path) -> None:
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("interval = 4", "interval = 5").replace("seed = 0", "seed = 9"))
    (run / "checkpoints" / "step-00000003" / "state.safetensors").write_bytes(b"else")
    assert audit.verify(run).problems == (
        "config.toml has method.interval = 5, but the journal 4",
        "config.toml has seed = 9, but the journal 0",
        "the checkpoint of step 3 is damaged",
    )
    assert "--repair" not in invoke("journal", "verify", run).stdout, "which mends the journal, and that is sound"
    (run / "config.toml").write_text("output = 3")
    assert any("config.toml" in problem for problem in audit.verify(run).problems)


def test_a_learning_rate_that_its_settings_do_not_give(tmp_path: Path) -> None:
    path = write(tmp_path / "j", HEADER, *ENTRIES[:3], replace(ENTRIES[3], lr=2e-6))
    assert audit.verify(path).problems == ("step 4 has the learning rate 2e-06, but its settings give 1e-06",)
    write(path, HEADER, *ENTRIES[:3], journal.Change(3, {"method.lr": 2e-6}), replace(ENTRIES[3], lr=2e-6))
    assert audit.verify(path).sound
    write(path, HEADER, replace(ENTRIES[0], lr=2e-6), *ENTRIES[1:])
    damage(path, 4)
    first, second = audit.verify(path).problems
    assert first.startswith("line 4 is damaged"), "what keeps a run from going on comes first"
    assert second.startswith("step 1 has the learning rate 2e-06")


@pytest.mark.parametrize("content", [b"", b"not a journal\n", b"\x00" * 99])
def test_a_file_that_is_no_journal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    shown = only_json(invoke("journal", "verify", path, "--json"), 1)
    assert (shown["sound"], shown["steps"], shown["size"]) == (False, 0, len(content))
    for words in (("show", path), ("diff", path, path), ("verify", path, "--repair")):
        refused = invoke("journal", *words)
        assert refused.exit_code == 2
        assert refused.stderr.startswith("error: ")


def test_the_same_run(run: Path, trained: Path) -> None:
    found = audit.diff(run, trained / "journal.jsonl")
    assert (found.same, found.header, found.steps, found.shared, found.parting) == (True, {}, (6, 6), 6, None)
    shown = invoke("journal", "diff", run, trained)
    assert shown.exit_code == 0
    assert shown.stdout.splitlines() == ["steps: 6 / 6, the first 6 of them the same", "the same run"]


def test_where_two_runs_part(tmp_path: Path) -> None:
    a = write(tmp_path / "a", HEADER, *ENTRIES)
    other = replace(ENTRIES[2], losses=(0.0, float("nan")), coefficients=())
    b = write(tmp_path / "b", replace(HEADER, seed=4, method=asdict(Method(eps=0.5))), *ENTRIES[:2], other)
    found = audit.diff(a, b)
    assert found.header == {"seed": (3, 4), "method.eps": (1e-3, 0.5)}
    assert (found.steps, found.shared, found.same) == ((6, 3), 2, False)
    assert found.parting is not None
    assert found.parting[0] == ENTRIES[2]
    shown = invoke("journal", "diff", a, b)
    assert shown.exit_code == 1
    assert shown.stdout.splitlines()[:3] == [
        "method.eps: 0.001 / 0.5",
        "seed: 3 / 4",
        "steps: 6 / 3, the first 2 of them the same",
    ]
    assert [line.split()[:2] for line in shown.stdout.splitlines()[4:6]] == [["A", "3"], ["B", "3"]]
    record = only_json(invoke("journal", "diff", a, b, "--json"), 1)
    assert [entry["losses"] for entry in record["parting"]] == [[2.5, 0.25], [0.0, None]]


def test_a_longer_run_is_another_one(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", HEADER, *ENTRIES), write(tmp_path / "b", HEADER, *ENTRIES[:4])
    found = audit.diff(a, b)
    assert (found.same, found.steps, found.shared, found.parting) == (False, (6, 4), 4, None)


def test_a_damaged_journal_is_not_compared(tmp_path: Path) -> None:
    path = write(tmp_path / "a", HEADER, *ENTRIES)
    damage(path, 3)
    with pytest.raises(JournalError, match="line 3 is damaged"):
        audit.diff(path, path)


def test_show(run: Path) -> None:
    lines = invoke("journal", "show", run).stdout.splitlines()
    values = dict(line.split(maxsplit=1) for line in lines[:9])
    assert values["seed"] == "0"
    assert "interval = 4" in values["method"]
    rows = [line.split() for line in lines[lines.index("6 steps") + 2 :]]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert rows[3][5:8] == ["window", "0,", "folded"]
    entry = journal.read(run / "journal.jsonl").entries[3]
    assert rows[3][1:3] == [f"{loss:.6f}" for loss in entry.losses]
    assert rows[3][-1] == f"{entry.batch:08x}"


def test_show_some(tmp_path: Path) -> None:
    skipped = Entry(3, (float("nan"), 1.0), (), 2e-6, 7)
    change = journal.Change(3, {"method.lr": 2e-6})
    path = write(tmp_path / "a", HEADER, *ENTRIES[:3], change, skipped, *ENTRIES[4:])
    record = only_json(invoke("journal", "show", path, "--step", "4", "--json"))
    assert record["entries"] == [
        {"step": 4, "losses": [None, 1.0], "coefficients": [], "lr": 2e-6, "batch": 7, "skipped": True}
    ]
    assert record["changes"] == [{"step": 4, "settings": {"method.lr": 2e-6}}]
    assert (record["steps"], record["bytes"], record["header"]) == (6, path.stat().st_size, asdict(HEADER))
    assert [
        entry["step"] for entry in only_json(invoke("journal", "show", path, "--last", 2, "--json"))["entries"]
    ] == [
        5,
        6,
    ]
    shown = invoke("journal", "show", path, "--last", 3).stdout
    assert "from step 4: method.lr = 2e-06" in shown
    assert "skipped, window 0" in shown
    assert "has 6 steps; got --step 7" in invoke("journal", "show", path, "--step", 7).stderr


def test_replay_and_rollback_on_the_command_line(run: Path, tmp_path: Path) -> None:
    words = ("replay", run, "--out", tmp_path / "out", "--step", 4)
    record = only_json(invoke(*words, "--json"))
    assert (record["step"], record["checkpoint"], record["same_bits"]) == (4, 3, True)
    assert "exists" in invoke(*words).stderr
    done = invoke("rollback", run, "--step", 4, "--set", "method.lr=2e-3")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        f"{run} is at step 4",
        f"kept      {run / 'branches' / 'branch-1'} (6 steps)",
        f"go on     zotune resume {run}",
        f"go back   zotune rollback {run} --branch branch-1",
    ]
    assert invoke("rollback", run, "--list").stdout.splitlines()[1].split()[:3] == ["branch-1", "6", "4"]
    listed = only_json(invoke("rollback", run, "--list", "--json"))["branches"]
    assert (listed[0]["name"], listed[0]["steps"], listed[0]["last"]["examples"]) == ("branch-1", 6, 24)
    kept = only_json(invoke("rollback", run, "--branch", "branch-1", "--json"))["kept"]
    assert (kept["name"], kept["steps"]) == ("branch-2", 4)
    shown = invoke("replay", run, "--out", tmp_path / "again").stdout.splitlines()
    assert shown[0].startswith(f"{tmp_path / 'again'}: the weights after 6 steps, replayed in ")
    assert shown[1] == "the checkpoint of step 6 has the same bits"


def test_a_place_without_a_journal_is_a_mistake_but_a_run_without_its_journal_is_not_sound(
    run: Path, tmp_path: Path
) -> None:
    for place in (tmp_path / "nowhere", tmp_path):
        for words in (("show", place), ("diff", run, place), ("verify", place), ("verify", place, "--repair")):
            refused = invoke("journal", *words)
            assert (refused.exit_code, refused.stdout) == (2, "")
            assert str(place) in refused.stderr
    (run / "journal.jsonl").unlink()
    assert only_json(invoke("journal", "verify", run, "--json"), 1)["sound"] is False


@pytest.mark.parametrize("words", [(), ("--step", 1, "--list"), ("--branch", "a", "--set", "train.steps=9")])
def test_rollback_wants_one_thing(run: Path, words: tuple[object, ...]) -> None:
    refused = invoke("rollback", run, *words)
    assert refused.exit_code == 2
    assert "give one of --step N" in refused.stderr


@pytest.mark.parametrize("command", ["replay", "rollback", "journal show", "journal verify", "journal diff"])
def test_every_option_is_documented(command: str) -> None:
    import typer

    selected = typer.main.get_command(cli.app)
    for word in command.split():
        selected = selected.commands[word]  # type: ignore[attr-defined]
    assert selected.help
    assert [parameter.name for parameter in selected.params if not parameter.help] == []
    assert "as_json" in [parameter.name for parameter in selected.params]


def test_what_a_user_puts_beside_checkpoints_is_none(run: Path) -> None:
    for name in ("step-00000006.bak", "step-best"):
        shutil.copytree(run / "checkpoints" / "step-00000006", run / "checkpoints" / name)
    assert audit.verify(run).checkpoints == (3, 6)
    assert audit.verify(run).sound
    zotune.rollback(run, 3)
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"step-00000003", "step-00000006.bak", "step-best"}
