from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_readme import parse
from tiny_runs import Recorder, configure, contents
from typer.testing import CliRunner

from zotune import cli, train
from zotune.config import dump, load
from zotune.data import Dataset
from zotune.errors import ConfigError, JournalError
from zotune.reporters import SilentReporter
from zotune.watching import report
from zotune.watching.report import examples
from zotune.watching.report.gather import Report, gather
from zotune.watching.report.render import render

HOSTILE = (
    "</style></p></bdi><script src=//evil.example/x.js>alert(1)</script><img src=x onerror=alert(1)>"
    "\"' onload=alert(1) x='&amp;&lt;{{ 7*7 }}\u202e\x00"
)


class Page(HTMLParser):
    """The elements, attributes and text of a page."""

    VOID = frozenset({"meta", "path", "use", "img", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]) -> Path:
    folder = tmp_path_factory.mktemp("report")
    chosen = configure(folder, tiny_model_folder, sentiment_files, train={"steps": 24, "eval_every": 6})
    train.start(chosen, SilentReporter())
    return folder / "run"


@pytest.fixture(scope="module")
def gathered(run: Path) -> Report:
    return gather(run)


def predictions(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]


def copied(run: Path, folder: Path, *but: str) -> Path:
    """The run in another folder, without some of its files."""
    folder.mkdir()
    for path in run.iterdir():
        if path.is_file() and path.name not in but:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_the_page_says_what_the_run_came_to(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    out = report.write(run, tmp_path / "below" / "page.html")
    assert contents(run) == before
    page = Page(out.read_text(encoding="utf-8"))
    assert page.open == []
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (line for line in lines if line["kind"] == "eval")
    assert f"{100 * first['accuracy']:.1f} % → {100 * last['accuracy']:.1f} %" in page.text
    assert f"{first['loss']:.3f} → {last['loss']:.3f}" in page.text
    assert "finished 24 of 24 steps" in page.text
    assert f"zotune eval {run}" in page.text
    assert page.tags["figure"] == page.tags["svg"] == 4


def test_the_page_needs_nothing_else(run: Path, tmp_path: Path) -> None:
    text = report.write(run, tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), tag
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#"), (tag, value)
    assert re.findall(r"url\((?!#)", text) == []
    assert "@import" not in text
    policy = [value for _, name, value in page.attributes if name == "content" and "default-src" in value]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids), "two pictures share an id"


def test_changed_examples_are_those_whose_prediction_changed(run: Path, gathered: Report) -> None:
    found, recorded = gathered.changes, predictions(run)
    assert found is not None
    assert found.note is None
    first, last = recorded[0]["right"], recorded[-1]["right"]
    pairs = list(zip(first, last, strict=True))
    assert [each.number - 1 for each in found.righted] == [i for i, pair in enumerate(pairs) if pair == (False, True)]
    assert [each.number - 1 for each in found.wronged] == [i for i, pair in enumerate(pairs) if pair == (True, False)]
    assert len(found.righted) - len(found.wronged) == found.right_after - found.right_before
    steady = {i for i in range(24) if len({each["right"][i] for each in recorded}) == 1}
    listed = {each.number - 1 for kind in (found.righted, found.wronged, found.flickered) for each in kind}
    assert listed == set(range(24)) - steady
    assert listed, "nothing changed, so the test shows nothing"


def test_changed_examples_have_their_text(run: Path, gathered: Report) -> None:
    rows = [json.loads(line) for line in (run.parent / "validation.jsonl").read_text().splitlines()]
    labels = {row["text"]: row["label"] for row in rows}
    found = gathered.changes
    assert found is not None
    for each in found.righted:
        gold = ("terrible", "great")[labels[each.prompt or ""]]
        assert (each.gold, each.after) == (gold, gold)
        assert each.before == {"great": "terrible", "terrible": "great"}[gold]


@pytest.mark.parametrize("missing", ["rows", "model"])
def test_without_rows_or_tokenizer_examples_have_their_numbers(run: Path, tmp_path: Path, missing: str) -> None:
    folder = copied(run, tmp_path / "run")
    config = load(run / "config.toml")
    table = {"rows": ("data", "validation"), "model": ("model", "path")}[missing]
    section = getattr(config, table[0]).model_copy(update={table[1]: str(tmp_path / "gone.jsonl")})
    (folder / "config.toml").write_text(dump(config.model_copy(update={table[0]: section})))
    found = gather(folder).changes
    assert found is not None
    assert found.note is not None
    assert "cannot be read any more" in found.note
    changed = (*found.righted, *found.wronged, *found.flickered)
    assert {(each.prompt, each.gold) for each in changed} == {(None, None)}
    assert {each.after for each in changed} <= {"candidate 0", "candidate 1"}
    assert "candidate 1" in Page(render(gather(folder))).text


def test_examples_show_the_prompt_that_was_written_on_from(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(run, tmp_path / "run")
    lines = [{"step": step, "predicted": ["x"] * 24, "right": [step > 0] * 24} for step in (0, 10)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = examples.load_data

    def merged(*args: Any) -> Dataset:
        data = whole(*args)
        shortened = (dataclasses.replace(each, alone=each.row.prompt[:2]) for each in data.validation)
        return dataclasses.replace(data, validation=tuple(shortened))

    monkeypatch.setattr(examples, "load_data", merged)
    found = gather(folder).changes
    assert found is not None
    assert {len((each.prompt or "").split()) for each in found.righted} == {2}


def test_written_answers_are_shown_as_they_are(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path / "run")
    lines = [
        {"step": 0, "predicted": ["a <b>cat</b>", *["x"] * 23], "right": [False, *[True] * 23]},
        {"step": 6, "predicted": ["dogs", *["x"] * 23], "right": [True, *[True] * 23]},
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    found = gather(folder).changes
    assert found is not None
    (changed,) = found.righted
    assert (changed.before, changed.after, changed.right) == ("a <b>cat</b>", "dogs", (False, True))
    page = Page(render(gather(folder)))
    assert "a <b>cat</b>" in page.text
    assert page.open == []


@pytest.mark.parametrize("text", [None, "", '{"step": 0, "predicted": [1], "right": [true]}\n', "junk\n[]\n{}\n"])
def test_without_two_evaluations_there_is_nothing_to_compare(run: Path, tmp_path: Path, text: str | None) -> None:
    folder = copied(run, tmp_path / "run", "predictions.jsonl")
    if text is not None:
        (folder / "predictions.jsonl").write_text(text)
    assert gather(folder).changes is None
    assert "not on record" in Page(render(gather(folder))).text


def hostile(value: Any, text: str) -> Any:
    """A copy of a dataclass with all of its texts replaced, but for what is not the run's own."""
    if isinstance(value, str):
        return text
    if isinstance(value, tuple):
        return tuple(hostile(each, text) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = {"metrics", "state"}
        fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        return type(value)(**{k: v if k in kept else hostile(v, text) for k, v in fields.items()})
    return value


def without_outcomes(gathered: Report) -> Report:
    """Names of scores are not the run's own words."""
    return dataclasses.replace(gathered, outcomes=())


def test_nothing_in_the_data_becomes_part_of_the_page(gathered: Report) -> None:
    plain = without_outcomes(gathered)
    assert gathered.changes is not None
    harmless, bad = Page(render(hostile(plain, "words"))), Page(render(hostile(plain, HOSTILE)))
    assert bad.tags == harmless.tags
    assert [each[:2] for each in bad.attributes] == [each[:2] for each in harmless.attributes]
    assert bad.open == []
    assert "{{ 7*7 }}" in bad.text


def test_half_a_surrogate_pair_does_not_stop_the_page(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path / "run")
    line = '{"step": %d, "predicted": ["\\ud800%d"], "right": [%s]}\n'
    (folder / "predictions.jsonl").write_text(line % (0, 0, "false") + line % (6, 1, "true"))
    assert "?1" in report.write(folder).read_text(encoding="utf-8")


def test_settings_that_are_not_at_their_default_come_first(gathered: Report) -> None:
    chosen = {each.key: (each.value, each.default) for each in gathered.set}
    assert chosen["method.lr"] == ("0.001", "1e-06")
    assert chosen["train.steps"] == ("24", "1000")
    assert chosen["data.prompt"] == ("{text}", "")
    usual = {each.key: each.value for each in gathered.usual}
    assert usual["method.preset"] == "lozo"
    assert usual["runtime.ray.replicas"] == "2"
    assert not set(usual) & set(chosen)


def test_the_commands_are_real(gathered: Report) -> None:
    assert len(gathered.commands) >= 4
    for _, command in gathered.commands:
        parse(shlex.split(command))


def test_timings_add_up(run: Path, gathered: Report) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert gathered.timings.training == pytest.approx(sum(x["seconds"] for x in lines if x["kind"] == "step"))
    assert gathered.timings.evaluating == pytest.approx(sum(x["seconds"] for x in lines if x["kind"] == "eval"))
    assert gathered.timings.forwards == 2 * 24
    assert gathered.timings.skipped == 0


def test_a_run_that_stopped_says_how_to_go_on(
    tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]
) -> None:
    chosen = configure(tmp_path, tiny_model_folder, sentiment_files)
    with pytest.raises(KeyboardInterrupt):
        train.start(chosen, Recorder(stop_after=2))
    page = Page(report.write(tmp_path / "run").read_text(encoding="utf-8"))
    assert "interrupted 2 of 30 steps" in page.text
    assert f"go on zotune resume {tmp_path / 'run'}" in page.text


def test_a_run_that_stopped_early_is_not_to_be_made_longer(
    tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]
) -> None:
    stalling = {"eval_every": 1, "patience": 1, "min_delta": 1e3}
    train.start(configure(tmp_path, tiny_model_folder, sentiment_files, train=stalling), Recorder())
    found = gather(tmp_path / "run")
    assert found.standing.state == "stopped early"
    assert not any("resume" in command for _, command in found.commands)


def test_a_run_without_a_manifest_or_with_a_step_without_a_time_is_shown(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path / "run", "manifest.json")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(
        re.sub(r'"seconds": [\d.]+, "rows_per_s": [\d.]+', '"seconds": null, "rows_per_s": null', text, count=3)
    )
    page = Page(report.write(folder).read_text(encoding="utf-8"))
    assert "Where it ran" not in page.text


def test_what_is_no_run_or_cannot_be_written_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="is not a run directory"):
        report.write(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the report"):
        report.write(run, tmp_path / "file" / "page.html")
    with pytest.raises(ConfigError, match="cannot write the report"):
        report.write(run, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*"))


def test_the_command(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.html"
    done = CliRunner().invoke(cli.app, ["report", str(run), "--out", str(out), "--json"])
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"run": str(run), "report": str(out)})
    refused = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert (refused.exit_code, refused.stdout) == (2, "")
