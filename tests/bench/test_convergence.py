from __future__ import annotations

import json
import shutil
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_runs import contents
from typer.testing import CliRunner

from zotune import cli
from zotune.bench import contenders, curve, procedures
from zotune.bench import convergence as bench
from zotune.bench.convergence import convergence
from zotune.bench.report import convergence as report
from zotune.bench.results import Result, every
from zotune.config import Config
from zotune.data import Dataset
from zotune.errors import ConfigError, DataError, ModelError
from zotune.evaluate import Metrics, evaluate
from zotune.optimizer import Method
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.testing.baselines.first_order import FirstOrder
from zotune.testing.baselines.official import OfficialLozo
from zotune.watching import sweep

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def rows(tmp_path: Path, sentiment_files: tuple[Path, Path]) -> Path:
    """A folder of tasks in which SST-2 and RTE are about the tiny model's words."""
    for task, names in (("sst2", ("sentence",)), ("rte", ("premise", "hypothesis"))):
        folder = tmp_path / "tasks" / task
        folder.mkdir(parents=True)
        for source in sentiment_files:
            found = [json.loads(line) for line in source.read_text().splitlines()]
            lines = [json.dumps({"label": row["label"], **dict.fromkeys(names, row["text"])}) for row in found]
            (folder / source.name).write_text("\n".join(lines) + "\n")
    return tmp_path / "tasks"


@pytest.fixture
def options(tmp_path: Path, rows: Path, tiny_model_folder: Path) -> dict[str, Any]:
    return {
        "out": tmp_path / "out", "data": rows, "model": str(tiny_model_folder), "dtype": "float32", "seeds": (0,),
        "steps": 4, "eval_every": 2, "batch_size": 4, "console": Console(file=StringIO()),
    }  # fmt: skip


def entry(options: dict[str, Any], method: str, task: str = "sst2", seed: int = 0) -> contenders.Entry:
    base = {
        "model": {"path": options["model"], "dtype": "float32"},
        "train": {"steps": options["steps"], "batch_size": options["batch_size"], "eval_every": options["eval_every"]},
    }
    read = contenders.Contender.read(method)
    return contenders.enter(read, base, task, seed, options["data"], options["out"] / "runs")


def points(result: Result) -> curve.Curve:
    return curve.restored(result.figures)


def judged(model: Any, data: Dataset) -> Metrics:
    with closing(EmbeddedRuntime(model, Method(scope="linear"))) as runtime:
        return evaluate(runtime, data.validation, data.objective).metrics


def test_every_side_takes_the_same_rows_in_the_same_order(options: dict[str, Any]) -> None:
    ours, theirs = (entry(options, method, seed=3) for method in ("lozo", "official-lozo,lr=1e-3"))
    assert ours.config.data == theirs.config.data
    assert ours.config.train == theirs.config.train
    results = convergence(["lozo", "official-lozo,lr=1e-3", "official-mezo"], **options)
    start, *others = (points(result)[0] for result in results)
    # The same weights and rows: before the first step nothing but rounding, in norms that are tuned, tells them apart.
    assert [point.loss for point in others] == pytest.approx([start.loss] * 2, rel=1e-6)
    assert [point.accuracy for point in others] == [start.accuracy] * 2
    assert {tuple(point.step for point in points(result)) for result in results} == {(0, 2, 4)}


def test_the_official_side_is_the_official_procedure(options: dict[str, Any]) -> None:
    chosen = entry(options, "official-lozo,lr=1e-3,rank=1", seed=5)
    found = list(procedures.train(procedures.PROCEDURES["official-lozo"], chosen.config))
    model, data = procedures.load(chosen.config)
    official = OfficialLozo(model, lr=1e-3, rank=1, seed=5)
    for step in range(4):
        official.step([data.train[index] for index in bench.BatchOrder(48, 4, 5).indices(step)])
    assert found[-1].metrics == judged(model, data)
    assert found[-1].metrics.loss != found[0].metrics.loss


@pytest.mark.parametrize(("name", "rank"), [("adamw", None), ("adamw-lora", 8)])
def test_backpropagation_learns_from_the_same_batches(options: dict[str, Any], name: str, rank: int | None) -> None:
    chosen = entry(options, f"{name},lr=1e-3", seed=5)
    found = list(procedures.train(procedures.PROCEDURES[name], chosen.config))
    model, data = procedures.load(chosen.config)
    tuner = FirstOrder(model, data.objective, lr=1e-3, steps=4, lora_rank=rank, seed=5)
    for step in range(4):
        tuner.step([data.train[index] for index in bench.BatchOrder(48, 4, 5).indices(step)])
    assert found[-1].metrics == judged(model, data)
    assert found[-1].metrics.loss != found[0].metrics.loss


def test_judging_leaves_the_model_as_it_was(options: dict[str, Any]) -> None:
    model, data = procedures.load(entry(options, "lozo").config)
    before = {name: (type(module), module.forward) for name, module in model.named_modules()}
    procedures.judge(model, data)
    assert {name: (type(module), module.forward) for name, module in model.named_modules()} == before


def test_forwards_and_tokens_are_counted_as_they_are_computed(options: dict[str, Any]) -> None:
    several = "lozo,lr=1e-3,directions=3"
    methods = ["lozo,lr=1e-3", several, f"{several},estimator=one-sided", "official-lozo", "adamw"]
    found = [points(result) for result in convergence(methods, **options)]
    # 4 steps of 4 rows; two probes a direction, or one and the clean model; a sequence per candidate in the official's,
    # and of these, going back is two more.
    assert [each[-1].rows for each in found] == [32, 96, 64, 64, 96]
    _, data = procedures.load(entry(options, "lozo").config)
    batches = [[data.train[i] for i in bench.BatchOrder(48, 4, 0).indices(step)] for step in range(4)]
    prompts = sum(len(example.row.prompt) for batch in batches for example in batch)
    assert [each[-1].tokens for each in found[:2]] == [2 * prompts, 6 * prompts]
    longest = [max(len(example.row.prompt) + 1 for example in batch) for batch in batches]
    assert found[3][-1].tokens == sum(2 * 8 * (-(-length // 8) * 8) for length in longest)
    assert found[4][-1].tokens == sum(3 * 8 * length for length in longest)
    assert [(each[0].rows, each[0].tokens, each[0].seconds) for each in found] == [(0, 0, 0.0)] * 5
    assert all(each[0].seconds < each[1].seconds < each[2].seconds for each in found)


def test_a_learning_rate_that_is_chosen_is_told_and_its_probes_count(options: dict[str, Any]) -> None:
    chosen, theirs = convergence(["lozo,directions=6,batch_size=2", "official-lozo"], **options)
    # 32 batches of 2 rows are probed along 4 directions, then 4 steps are taken, every 2 of 48 row forwards.
    assert [point.rows for point in points(chosen)] == [512, 560, 608]
    assert chosen.case["config"]["method"]["lr"] == "auto"
    assert 0 < chosen.figures["lr"] < 1
    assert theirs.figures["lr"] == theirs.case["config"]["method"]["lr"] == 1e-6
    again = convergence(["lozo,directions=6,batch_size=2"], retry=True, **options)
    assert again == [chosen]


def test_a_case_goes_on_within_itself(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = convergence(["lozo,lr=1e-3"], **options)
    shutil.move(options["out"], options["out"].with_name("whole"))
    carry_on, heard = bench.carry_on, []

    class Stopping(bench.SilentReporter):
        def step(self, record: Any) -> None:
            heard.append(record["step"])
            if heard == [1, 2, 3]:
                raise KeyboardInterrupt

    monkeypatch.setattr(bench, "carry_on", lambda planned, where, live: carry_on(planned, where, Stopping()))
    with pytest.raises(KeyboardInterrupt):
        convergence(["lozo,lr=1e-3"], **options)
    assert not list(options["out"].glob("*.json"))
    (resumed,) = convergence(["lozo,lr=1e-3"], **options)
    assert heard == [1, 2, 3, 4]
    assert [(p.step, p.loss, p.accuracy, p.rows) for p in points(resumed)] == [
        (p.step, p.loss, p.accuracy, p.rows) for p in points(whole)
    ]
    assert every(options["out"]) == [resumed], "run directories lie beside the results and are none"
    before = contents(options["out"])
    assert convergence(["lozo,lr=1e-3"], **options) == [resumed]
    assert contents(options["out"]) == before


def test_a_result_has_its_whole_configuration_and_no_folder_of_this_machine(options: dict[str, Any]) -> None:
    (result,) = convergence(["lozo,lr=1e-3,steps=2"], **options)
    config = result.case["config"]
    assert (config["method"]["lr"], config["method"]["rank"], config["train"]["steps"]) == (1e-3, 2, 2)
    assert (config["data"]["train"], config["model"]["dtype"]) == ("train.jsonl", "float32")
    assert str(options["out"].parent) not in json.dumps(result.case)
    assert points(result)[-1].step == 2


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("official-loso", "unknown method 'official-loso'. Did you mean 'official-lozo'"),
        ("lozzo", "unknown method 'lozzo'. Did you mean 'lozo'"),
        ("lozo,momentun=0.9", "unknown setting of lozo 'momentun'. Did you mean 'momentum'"),
        ("official-lozo,momentum=0.9", "unknown setting of official-lozo 'momentum'"),
        ("official-mezo,rank=2", "unknown setting of official-mezo 'rank'"),
        ("lozo,preset=mezo", "unknown setting of lozo 'preset'"),
        ("lozo,lr", "cannot read the setting"),
        ("lozo,lr=fast", "method.lr"),
        ("lozo,steps=0", "train.steps"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(options: dict[str, Any], method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convergence(["lozo", method], **options)
    with pytest.raises(ConfigError, match=r"unknown task 'sst3'\. Did you mean 'sst2'"):
        convergence(["lozo"], tasks=["sst2", "sst3"], **options)
    for name in ("tasks", "seeds"):
        with pytest.raises(ConfigError, match=f"there are no {name} to measure; give at least one"):
            convergence(["lozo"], **options | {name: []})
    with pytest.raises(DataError, match=r"cb is no folder; give a folder"):
        convergence(["lozo"], tasks=["sst2", "cb"], **options)
    assert not options["out"].exists()


def test_a_model_that_is_not_there_is_a_mistake_and_no_result(options: dict[str, Any]) -> None:
    for model in ("nowhere/nothing", str(options["out"])):
        with pytest.raises(ModelError):
            convergence(["lozo"], **options | {"model": model})
    assert not options["out"].exists()


def test_a_training_that_fails_is_a_result_and_the_others_go_on(options: dict[str, Any]) -> None:
    # The tiny tokenizer knows neither of RTE's candidates.
    results = convergence(["lozo"], tasks=["rte", "sst2"], **options)
    text = report.render(results).markdown
    assert "- lozo rte 0: " in text
    assert "the candidates 'Yes' and 'No' have the same tokens" in text
    assert "| lozo | 1 | 4 x 4 |" in text


def test_a_training_that_diverged_fails_again_without_training(options: dict[str, Any]) -> None:
    methods = ["lozo,lr=1e-3,eps=1e38,steps=12"]
    (first,) = convergence(methods, **options)
    assert "was not finite in 10 steps in a row" in first.figures["error"]
    (second,) = convergence(methods, retry=True, **options)
    assert "diverged after" in second.figures["error"]


def test_both_sides_learn_the_right_answer_alone_where_a_task_says_so(options: dict[str, Any]) -> None:
    folder = options["data"] / "copa"
    folder.mkdir()
    row = {"premise": "the film was weak.", "question": "effect", "choice1": "It was dull", "choice2": "It was fine"}
    for split in ("train", "validation"):
        rows = [json.dumps({**row, "premise": f"{number} {row['premise']}", "label": 1}) for number in range(4)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    ours, theirs = convergence(["lozo,lr=1e-3", "official-lozo,lr=1e-3"], tasks=["copa"], **options)
    for result in (ours, theirs):
        first, *_, last = points(result)
        assert last.loss < first.loss
        # Two forwards of a sequence per row, in 4 steps of 4 rows.
        assert last.rows == 32
    # On some processors norms that are tuned round their last bit otherwise.
    assert points(ours)[0].loss == pytest.approx(points(theirs)[0].loss, rel=1e-6)


def made(method: str, seed: int, *accuracies: float) -> Result:
    curve_ = [
        {
            "step": 10 * i,
            "rows": 320 * i,
            "tokens": 6400 * i,
            "seconds": 5.0 * i,
            "loss": 1.0 - share,
            "accuracy": share,
        }
        for i, share in enumerate(accuracies)
    ]
    config = {
        "model": {"path": "tiny", "dtype": "float32"},
        "data": {"validation_size": 24},
        "train": {"seed": seed, "batch_size": 16},
    }
    case = {"method": method, "task": "sst2", "seed": seed, "config": config}
    return Result("convergence", case, {"curve": curve_}, {})


def test_the_report_spreads_over_seeds_and_says_what_was_not_reached() -> None:
    results = [made("lozo", 0, 0.5, 0.7, 0.8), made("mezo", 0, 0.5, 0.55), made("lozo", 1, 0.5, 0.6, 0.7)]
    text = report.render(results, [0.7, 0.8, 0.9]).markdown
    assert "| lozo | 2 | 20 x 16 | 0.250 ± 0.071 | 75.0 ± 7.1 | 75.0 ± 7.1 | 640 | 12,800 | 0:10 |" in text
    assert "| mezo | 1 | 10 x 16 | 0.450 | 55.0 | 55.0 | 320 | 6,400 | 0:05 |" in text
    assert "| lozo | 15, 480, 0:08 | 20, 640, 0:10 (1 of 2 seeds) | not reached |" in text
    ((name, draw),) = report.render(results).pictures.items()
    assert name == "convergence-sst2-tiny-float32-24-validation-rows"
    loss, by_forwards, by_time = draw().axes
    # Two seeds of one method and one of the other.
    assert [len(panel.get_lines()) for panel in (loss, by_forwards, by_time)] == [3, 3, 3]
    assert list(by_forwards.get_lines()[0].get_xdata()) == [0, 320, 640]


def test_a_target_that_is_never_reached_is_null() -> None:
    record = report.record([made("lozo", 0, 0.5, 0.75)], [0.7, 0.8])
    (result,) = record["results"]
    assert result["reached"]["0.8"] is None
    assert result["reached"]["0.7"]["rows"] == 320


def test_the_command_goes_on_and_speaks_json(options: dict[str, Any]) -> None:
    words = ["bench", "convergence", "--method", "lozo,lr=1e-3", "--seeds", "0,1", "--steps", "2"]
    words += ["--model", options["model"], "--data", str(options["data"]), "--out", str(options["out"])]
    words += ["--batch-size", "4", "--dtype", "float32", "--threads", "1"]
    first = CliRunner().invoke(cli.app, [*words, "--minutes", "0"])
    assert first.exit_code == 0, first.output
    assert "2 cases left" in first.stderr
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "### sst2, " in done.stdout
    again = CliRunner().invoke(cli.app, [*words, "--json", "--targets", "0.1,1.1"])
    assert "2 of 2 cases measured already" in again.stderr
    (line,) = again.stdout.splitlines()
    assert [each["case"]["seed"] for each in json.loads(line)["results"]] == [0, 1]
    assert all(each["reached"]["1.1"] is None for each in json.loads(line)["results"])
    refused = CliRunner().invoke(cli.app, [*words, "--targets", "high"])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "--targets: got 'high'" in refused.stderr


def test_a_kept_search_is_a_sweep() -> None:
    (path,) = (Path(__file__).parents[2] / "benchmarks" / "search").glob("*.toml")
    plan = sweep.read(path)
    assert f"zotune sweep benchmarks/search/{path.name}" in path.read_text()
    forwards = [run.config.train.steps * run.config.train.batch_size * _forwards(run.config) for run in plan.runs]
    assert forwards == pytest.approx([9600] * len(forwards), rel=0.06), "what is compared must cost the same"


def _forwards(config: Config) -> float:
    """Of a row in a step; below the last fifth of the layers, or the last two in turn, all probes share one."""
    method = config.method
    assert method.directions is not None
    probes = 1 + method.directions if method.estimator == "one-sided" else 2 * method.directions
    return 0.7 + 0.3 * probes if method.scope == "last-layers" else probes
