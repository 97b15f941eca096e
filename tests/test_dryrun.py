"""Dry runs: what they show, that it is so, and that they leave nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import configure
from typer.testing import CliRunner

import zotune
from zotune import config as configuration
from zotune.cli import app
from zotune.config import Config
from zotune.dryrun.tokens import LONGEST, TokenRow
from zotune.rows import Candidate, Example, Row
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")
Files = tuple[Path, Path]


@pytest.fixture
def chosen(tmp_path: Path, tiny_model_folder: Path, sentiment_files: Files) -> Config:
    return configure(tmp_path, tiny_model_folder, sentiment_files)


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_folder)


def test_it_tells_what_the_run_will_do_and_leaves_nothing_behind(chosen: Config, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = zotune.dry_run(chosen)
    assert sorted(tmp_path.rglob("*")) == before
    session = Session.build(chosen)
    assert found.sites == session.runtime.layout
    assert (found.train.rows, found.validation.rows, found.batches) == (48, 24, 12)
    assert found.train.tokens == sum(example.row.n_tokens for example in session.data.train)
    assert found.train.scored == 96
    assert found.notices == session.data.notices
    text = str(found)
    assert "12 batches of 4 rows take every training row once; 30 steps are 2.5 epochs" in text
    assert f"20 sites with {found.sites.size:,} parameters" in text
    assert "2 x model.layers.*.self_attn.q_proj.weight  32 x 32" in text


def test_its_rows_are_those_of_the_first_steps(chosen: Config, tokenizer: Any) -> None:
    session = Session.build(chosen)
    taken = [example for step in (0, 1) for example in session.batch(step)[0]][:5]
    found = zotune.dry_run(chosen)
    assert found.rows == tuple(TokenRow.of(example, tokenizer) for example in taken)
    assert [row.gold for row in found.rows] == [example.gold for example in taken]
    right = found.rows[0].candidates[found.rows[0].gold]
    assert [piece.strip() for piece, scored in right if scored] == [["terrible", "great"][taken[0].gold]]


def test_its_estimates_add_up(chosen: Config) -> None:
    found = zotune.dry_run(chosen)
    sizes = {site.name: site.size for site in found.sites.sites}
    assert found.memory.weights >= 4 * sum(sizes.values())
    matrices = [site.shape for site in found.sites.sites if site.is_matrix]
    vectors = sum(site.size for site in found.sites.sites if not site.is_matrix)
    assert found.memory.factors == 4 * (2 * sum(9 * out + 3 * width for out, width in matrices) + 9 * vectors)
    assert found.memory.measured > found.memory.total
    time = found.time
    assert time.total == pytest.approx(30 * time.step + 2 * time.evaluation)
    assert 0 < time.step < 10


def test_a_learning_rate_that_is_chosen_takes_time(chosen: Config) -> None:
    time = zotune.dry_run(chosen.having("method", lr="auto", directions=8)).time
    assert time.choosing == pytest.approx(32 * time.step / 2), "of each of 32 batches the probes of four directions"
    assert time.total == pytest.approx(30 * time.step + 2 * time.evaluation + time.choosing)


def test_an_evaluation_is_timed_by_clean_rows(chosen: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose directions take an hour does not make an evaluation take hours."""
    clock, score = [0.0], EmbeddedRuntime.score

    def slow(runtime: Any, probes: Any, rows: Any, *, normalised: bool) -> Any:
        clock[0] += 3600.0 if any(probe.sign for probe in probes) else 0.01 * sum(row.n_tokens for row in rows)
        return score(runtime, probes, rows, normalised=normalised)

    monkeypatch.setattr(EmbeddedRuntime, "score", slow)
    monkeypatch.setattr("zotune.dryrun.estimate.time.perf_counter", lambda: clock[0])
    found = zotune.dry_run(chosen)
    assert found.time.step == 3600.0
    assert found.time.evaluation == pytest.approx(0.01 * found.validation.tokens)


@pytest.mark.parametrize(
    ("table", "more"),
    [({"runtime": {"fold": "master"}}, True), ({"method": {"momentum": 0.9, "preset": "lozo-m"}}, True)],
)
def test_what_a_method_keeps_costs_memory(chosen: Config, table: dict[str, Any], more: bool) -> None:
    tables = chosen.model_dump(exclude_none=True)
    for name, values in table.items():
        tables[name] |= values
    other = zotune.dry_run(configuration.parse(tables))
    assert (other.memory.factors > zotune.dry_run(chosen).memory.factors) is more


def test_the_command_in_text_and_json(chosen: Config, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(configuration.dump(chosen), encoding="utf-8")
    shown = CliRunner().invoke(app, ["run", str(path), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("⟦ terrible⟧") == shown.output.count("⟦ great⟧") == 5
    assert "nothing was trained and nothing was written" in shown.output
    told = CliRunner().invoke(app, ["run", str(path), "--dry-run", "--json"])
    record = json.loads(told.stdout)
    assert record["sites"]["count"] == len(record["sites"]["names"]) == 20
    assert sum(kind["count"] for kind in record["sites"]["kinds"]) == 20
    assert len(record["rows"]) == 5
    assert not Path(chosen.output).exists()


def test_an_output_that_exists_is_a_notice_and_stays_as_it_is(chosen: Config) -> None:
    Path(chosen.output).mkdir()
    (Path(chosen.output) / "kept").write_text("mine")
    assert any("exists; the run needs another output" in notice for notice in zotune.dry_run(chosen).notices)
    assert (Path(chosen.output) / "kept").read_text() == "mine"


def test_a_mistake_is_one_line(chosen: Config, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(configuration.dump(chosen), encoding="utf-8")
    done = CliRunner().invoke(app, ["run", str(path), "--dry-run", "--set", "data.prompt={txt}"])
    assert done.exit_code == 2
    assert "Did you mean 'text'?" in done.stderr


def test_tokens_that_do_not_count_stay_unmarked(tokenizer: Any) -> None:
    the, film, great = (tokenizer.vocab[word] for word in ("the", "film", "great"))
    row = Row((the,), (Candidate((film, great, film), (1,)), Candidate((great,), (0,))))
    assert TokenRow.of(Example(row, 1), tokenizer).lines() == ["the", "     film│⟦ great⟧ film│", "  > ⟦ great⟧"]


def test_long_rows_lose_their_middle_and_odd_characters_their_power() -> None:
    row = TokenRow(("a\n\x1b",) * (LONGEST + 7), ((("b", True),),), 0)
    prompt = row.lines()[0]
    assert " ... 7 tokens ... " in prompt
    assert prompt.count(r"a\n\x1b") == LONGEST


def test_conversations_show_what_the_assistant_says(chosen: Config, tmp_path: Path, tiny_model_folder: Path) -> None:
    model = shutil.copytree(tiny_model_folder, tmp_path / "chatty")
    (model / "chat_template.jinja").write_text("{% for m in messages %}is {{ m.content }}<s>{% endfor %}")
    rows = [
        {"messages": [{"role": "user", "content": f"{noun} {word}"}, {"role": "assistant", "content": "great film"}]}
        for noun in ("film", "plot", "cast")
        for word in ("fine", "dull", "warm")
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = chosen.model_dump(exclude_none=True)
    tables["model"]["path"] = str(model)
    tables["data"] = {"train": str(tmp_path / "chats.jsonl"), "messages": "messages"}
    found = zotune.dry_run(configuration.parse(tables))
    assert (found.train.rows, found.train.scored) == (8, 32)
    prompt, answer = found.rows[0].lines()
    assert prompt.startswith("is│")
    assert answer == "  > ⟦ is⟧⟦ great⟧⟦ film⟧⟦ <s>⟧"
