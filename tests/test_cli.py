from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from zotune import checkpoint, cli, config
from zotune.cli.program import INTERRUPTED, TERMINATED, USER_ERROR, Commands, command_line, print_json
from zotune.errors import ConfigError
from zotune.journal import Journal

PROGRAM = [sys.executable, "-c", "from zotune.cli import main; main()"]


def invoke(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def program(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, text=True, check=False)


def only_json(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def refusal(result: Result) -> str:
    """What a user's mistake prints: exit code 2, nothing on stdout."""
    assert result.exit_code == USER_ERROR, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture
def config_file(tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]) -> Path:
    """A run of four steps, into a directory whose name needs quoting."""
    train, validation = sentiment_files
    chosen = config.parse(
        {
            "output": str(tmp_path / "my run"),
            "model": {"path": str(tiny_model_folder), "dtype": "float32", "device": "cpu"},
            "data": {
                "train": str(train),
                "validation": str(validation),
                "prompt": "{text} It was",
                "candidates": [" terrible", " great"],
                "label": "label",
            },
            "method": {"lr": 1e-4},
            "train": {"steps": 4, "batch_size": 4, "eval_every": 2},
            "runtime": {"threads": 1},
        }
    )
    path = tmp_path / "config.toml"
    path.write_text(config.dump(chosen), encoding="utf-8")
    return path


def test_help_is_quick_because_it_loads_no_heavy_library() -> None:
    script = """
import sys
from typer.testing import CliRunner
from zotune import cli
assert CliRunner().invoke(cli.app, ["--help"]).exit_code == 0
print(*sorted({"torch", "transformers", "numpy", "matplotlib", "pydantic"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


COMMANDS = {
    *("run", "resume", "demo", "sweep", "eval", "plot", "report", "presets", "tasks", "replay", "rollback"),
    *("journal show", "journal verify", "journal diff", "export", "apply"),
    *("bench step", "bench runtimes", "bench scaling", "bench overhead", "bench parity", "bench convergence"),
    *("bench cluster", "bench report", "scale"),
}


def commands(group: Any, *words: str) -> Iterator[tuple[str, Any]]:
    """Every command of the program with its words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *words, name)
        else:
            yield " ".join((*words, name)), command


def test_help_names_every_command() -> None:
    shown = program("--help")
    assert shown.returncode == 0
    assert dict(commands(typer.main.get_command(cli.app))).keys() == COMMANDS
    for command in COMMANDS:
        assert f" {command.split()[0]} " in shown.stdout


def test_the_package_is_the_program() -> None:
    words = [sys.executable, "-m", "zotune"]
    shown = subprocess.run([*words, "tasks", "--json"], capture_output=True, text=True, check=True)
    assert shown.stdout == program("tasks", "--json").stdout
    refused = subprocess.run([*words, "rnu"], capture_output=True, text=True, check=False)
    assert refused.returncode == USER_ERROR
    assert refused.stderr.startswith("Usage: zotune ")


INTERRUPTED_LOADING = """
import sys

class Interrupt:
    def find_spec(name, *_):
        if name == "typer":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt)
from zotune.__main__ import main
main()
"""


def test_ctrl_c_while_the_program_is_loaded_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_LOADING], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "interrupted\n")


@pytest.mark.parametrize(
    ("first", "found", "expected"),
    [
        ("/bin/zotune", "/bin/zotune", "zotune"),
        ("/venv/bin/zotune", "/bin/zotune", "/venv/bin/zotune"),
        ("/venv/bin/zotune", None, "/venv/bin/zotune"),
        ("/lib/zotune/__main__.py", "/bin/zotune", "zotune"),
        ("/lib/zotune/__main__.py", None, f"{sys.executable} -m zotune"),
        ("script.py", None, "zotune"),
        ("/lib/pytest/__main__.py", None, "zotune"),
    ],
)
def test_what_to_go_on_with_can_be_typed(
    monkeypatch: pytest.MonkeyPatch, first: str, found: str | None, expected: str
) -> None:
    monkeypatch.setattr(sys, "argv", [first, "run"])
    monkeypatch.setattr("shutil.which", lambda name: found)
    assert command_line("resume", Path("a b")) == f"{expected} resume 'a b'"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_is_documented(command: str) -> None:
    selected = dict(commands(typer.main.get_command(cli.app)))[command]
    assert selected.help
    assert [parameter.name for parameter in selected.params if not parameter.help] == []
    assert "as_json" in [parameter.name for parameter in selected.params]


def test_version() -> None:
    shown = program("--version")
    assert shown.returncode == 0
    assert shown.stdout.startswith("zotune ")
    assert len(shown.stdout.splitlines()) == 1


def test_a_mistake_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("output = 'runs/a'\n[model]\npath = 'm'\n[data]\n[train]\nstesp = 3\n")
    failed = program("run", path)
    assert failed.returncode == USER_ERROR
    assert failed.stdout == ""
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"error: {path}: unknown key 'train.stesp'. Did you mean 'train.steps'?")


def test_an_unknown_command_is_refused() -> None:
    failed = program("rnu")
    assert failed.returncode == 2
    assert "No such command 'rnu'" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("got a [bracket]"), 2, "error: got a [bracket]"),
        (PermissionError(13, "Permission denied", "runs"), 2, "error: [Errno 13] Permission denied: 'runs'"),
        (OSError(36, "File name too long", "runs"), 2, "error: [Errno 36] File name too long: 'runs'"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_ends_a_command_early(error: BaseException, code: int, line: str) -> None:
    app = typer.Typer(cls=Commands)

    @app.callback()
    def program() -> None: ...

    @app.command()
    def fail() -> None:
        raise error

    result = CliRunner().invoke(app, ["fail"])
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (code, "", line)


@pytest.mark.parametrize("command", ["eval", "resume", "plot", "report", "export", "replay", "journal"])
def test_a_name_that_no_file_can_have_is_one_line(tmp_path: Path, command: str) -> None:
    words = {"export": ["--out", str(tmp_path / "out")], "replay": ["--out", str(tmp_path / "out")]}
    between = ["verify"] if command == "journal" else []
    result = CliRunner().invoke(cli.app, [command, *between, "x" * 300, *words.get(command, [])])
    assert "File name too long" in refusal(result)
    assert len(result.stderr.splitlines()) == 1


def test_what_a_terminal_cannot_show_is_replaced(config_file: Path) -> None:
    words = [*PROGRAM, "run", str(config_file), "--dry-run"]
    shown = subprocess.run(words, capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert shown.returncode == 0, shown.stderr
    assert b"?" in shown.stdout


def test_nobody_reading_on_is_no_mistake() -> None:
    with subprocess.Popen([*PROGRAM, "presets", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        started.stdout.close()
        told = started.stderr.read()
    assert b"Traceback" not in told
    assert b"error" not in told


def test_a_programming_error_keeps_its_traceback() -> None:
    app = typer.Typer(cls=Commands)

    @app.command()
    def fail() -> None:
        raise ZeroDivisionError

    assert isinstance(CliRunner().invoke(app).exception, ZeroDivisionError)


def test_presets_are_listed_with_sources_and_defaults() -> None:
    shown = invoke("presets").stdout
    assert "lozo-m" in shown
    assert "momentum = 0.9" in shown
    assert "lr = auto (published: 1e-06)" in shown
    assert "Chen" in shown


def test_one_preset_is_shown_with_its_deviations() -> None:
    shown = invoke("presets", "mezo").stdout
    assert "Malladi" in shown
    assert "deviations from the published method:\n  " in shown
    assert "rank" not in shown, "has no meaning for dense directions"
    assert "\n  lr = auto (published: 1e-06)\n" in shown
    assert "\n  lr = auto\n" in invoke("presets", "lozo-late").stdout, "there is no published one"


def test_presets_as_json() -> None:
    records = only_json(invoke("presets", "--json"))
    assert {"lozo", "lozo-m", "mezo", "mezo-factorized", "mezo-lora"} <= {record["name"] for record in records}
    assert only_json(invoke("presets", "lozo", "--json"))["method"]["rank"] == 2


def test_an_unknown_preset_gets_the_nearest_name() -> None:
    assert "Did you mean 'lozo'?" in refusal(invoke("presets", "lozzo"))


def test_plot_prints_where_the_picture_is(tmp_path: Path) -> None:
    record = {"kind": "eval", "step": 0, "loss": 0.7, "accuracy": 0.5, "seconds": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert invoke("plot", tmp_path).stdout == f"{tmp_path / 'curves.png'}\n"
    assert only_json(invoke("plot", tmp_path, "--json")) == {
        "run": str(tmp_path),
        "plot": str(tmp_path / "curves.png"),
    }


@pytest.mark.parametrize("command", ["resume", "eval", "plot"])
def test_a_directory_that_is_no_run(tmp_path: Path, command: str) -> None:
    assert str(tmp_path) in refusal(invoke(command, tmp_path))
    assert "absent" in refusal(invoke(command, tmp_path / "absent"))


def test_numbers_that_are_not_finite_are_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "steps": 3})
    assert capsys.readouterr().out == '{"loss": null, "steps": 3}\n'


def test_a_run_says_how_to_go_on_and_what_it_says_works(config_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "my run"
    done = invoke("run", config_file)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step ")] == ["step 0/4", "step 2/4", "step 4/4"]
    assert any(line.startswith("accuracy ") and line.count("%") == 2 for line in lines)
    assert f"picture   {path / 'curves.png'}" in lines
    assert (path / "curves.png").exists()
    words = {line.split()[0]: shlex.split(line)[2:] for line in lines if line.startswith(("evaluate ", "resume "))}
    assert words["evaluate"] == ["eval", str(path)]
    assert words["resume"] == ["resume", str(path), "--steps", "8"]

    evaluated = invoke(*words["evaluate"])
    assert evaluated.exit_code == 0, evaluated.output
    assert evaluated.stdout.startswith("loss ")
    resumed = only_json(invoke(*words["resume"], "--json"))
    assert resumed["steps"] == 8


def test_a_run_that_stopped_early_says_what_makes_it_go_on(config_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "my run"
    done = invoke("run", config_file, "--set", "train.patience=1", "--set", "train.min_delta=1e3")
    assert "2 steps, stopped early" in done.stdout
    file = path / "config.toml"
    assert f"resume    raise train.patience in {file}, then zotune resume '{path}'" in done.stdout.splitlines()
    assert only_json(invoke("resume", path, "--steps", "8", "--json"))["steps"] == 2
    file.write_text(file.read_text().replace("patience = 1\n", "patience = 9\n"))
    assert only_json(invoke("resume", path, "--json"))["steps"] == 8


def test_json_is_the_only_line_on_stdout(config_file: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "my run")
    result = invoke("run", config_file, "--set", "train.steps=2", "--set", "method.schedule=linear", "--json")
    record = only_json(result)
    assert (record["run"], record["steps"], record["skipped"], record["examples"]) == (path, 2, 0, 24)
    assert 0 <= record["accuracy_before"] <= 1
    assert record["train_seconds"] > 0
    assert "step 2/2" in result.stderr
    assert "--steps" not in result.stderr, "a learning rate that fell to 0 leaves nothing to extend"

    evaluated = only_json(invoke("eval", path, "--json"))
    assert evaluated["run"] == path
    assert evaluated["accuracy"] == record["accuracy_after"]
    assert evaluated["loss"] == pytest.approx(record["loss_after"], rel=1e-6)


def test_an_existing_run_is_refused_and_resume_is_named(config_file: Path) -> None:
    assert invoke("run", config_file).exit_code == 0
    assert "resume" in refusal(invoke("run", config_file))


def test_an_unknown_model_is_a_line_not_a_traceback(config_file: Path, tmp_path: Path) -> None:
    refusal(invoke("run", config_file, "--set", f"model.path={tmp_path / 'nothing'}"))
    assert not (tmp_path / "my run").exists()


@pytest.mark.parametrize("errors", ["apart", "into the same pipe"])
def test_a_run_outlives_the_reader_of_its_output(config_file: Path, tmp_path: Path, errors: str) -> None:
    words = ["run", str(config_file), "--set", "train.steps=40", "--set", "train.eval_every=1"]
    with (tmp_path / "errors").open("w") as file:
        process = subprocess.Popen(
            [*PROGRAM, *words],
            stdout=subprocess.PIPE,
            stderr=file if errors == "apart" else subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        while not process.stdout.readline().startswith("step 1/40"):
            assert process.poll() is None
        process.stdout.close()
        assert process.wait(timeout=120) == 0
    path = tmp_path / "my run"
    assert len(Journal.open(path / "journal.jsonl").entries) == 40
    assert checkpoint.sound(path / "checkpoints", 40)
    assert (path / "curves.png").exists()
    told = (tmp_path / "errors").read_text().splitlines()
    expected = "nobody reads the output any more; the run goes on, and Ctrl-C saves and ends it"
    assert told.count(expected) == (errors == "apart")
    assert "Traceback" not in "".join(told)


@pytest.fixture(params=[False, True], ids=["no handler", "another handler"])
def others_handler(request: pytest.FixtureRequest) -> Iterator[None]:
    """SIGTERM as a process has it, or with a handler such as Ray leaves behind."""
    before = signal.signal(signal.SIGTERM, (lambda number, _: sys.exit(number)) if request.param else signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, INTERRUPTED, "interrupted"), (signal.SIGTERM, TERMINATED, "terminated")],
)
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.usefixtures("others_handler")
def test_a_signal_while_a_run_is_loaded_is_answered(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, word: str, begun: bool
) -> None:
    path = config.load(config_file).output
    words, hint = ["run", str(config_file)], " before the first step"
    if begun:
        assert CliRunner().invoke(cli.app, words).exit_code == 0
        words, hint = ["resume", path], f"; go on with: zotune resume '{path}'"
    monkeypatch.setattr("zotune.session.load_data", lambda *_: signal.raise_signal(number))
    before = signal.getsignal(number)
    result = CliRunner().invoke(cli.app, words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.splitlines()[-1] == word + hint
    assert signal.getsignal(number) == before


def test_a_sweep_that_is_terminated_says_how_to_go_on(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(f'output = "{tmp_path}/sweep"\nbase = "{config_file}"\ngrid.train.seed = [0, 1]\n')
    monkeypatch.setattr("zotune.session.load_data", lambda *_: signal.raise_signal(signal.SIGTERM))
    result = CliRunner().invoke(cli.app, ["sweep", str(file)])
    assert result.exit_code == TERMINATED
    assert result.stderr.splitlines()[-1] == f"terminated; go on with: zotune sweep {file}"


@pytest.mark.parametrize("output", ["TMP/my run", "~/my run"])
def test_ctrl_c_ends_with_the_command_that_goes_on(config_file: Path, tmp_path: Path, output: str) -> None:
    path = tmp_path / "my run"
    words = ["run", str(config_file), "--set", "train.steps=100000"]
    words += ["--set", f"output={output.replace('TMP', str(tmp_path))}"]
    process = subprocess.Popen(
        [*PROGRAM, *words],
        env={**os.environ, "HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it puts into the background with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    journal = path / "journal.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < deadline, "no step was journalled"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, errors
    assert errors.splitlines()[-1] == f"interrupted; go on with: zotune resume '{path}'"
    assert "Traceback" not in errors
