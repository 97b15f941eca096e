import gzip
import json
import sys
import time

import pytest

from zotune.data.sources import File, Hub, locate
from zotune.errors import DataError

ROWS = [{"text": "a film\u2028of two lines", "label": 0}, {"text": 'café, "fine"', "label": 1}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read(path):
    return list(locate(str(path), "train").read())


@pytest.mark.parametrize("text", [LINES, "\ufeff" + LINES, LINES.replace("\n", "\r\n\r\n"), json.dumps(ROWS, indent=1)])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".JSONL"])
def test_json(tmp_path, text, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(text.encode())
    assert read(path) == ROWS


def test_compressed_json(tmp_path):
    path = tmp_path / "rows.v2.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode()))
    assert read(path) == ROWS


@pytest.mark.parametrize("compress", [False, True])
def test_csv(tmp_path, compress):
    path = tmp_path / ("rows.csv.gz" if compress else "rows.csv")
    raw = 'text,label\n"two\nlines",0\n"café, ""fine""",1\n'.encode()
    path.write_bytes(gzip.compress(raw) if compress else raw)
    assert read(path) == [{"text": "two\nlines", "label": "0"}, {"text": 'café, "fine"', "label": "1"}]


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist(ROWS), path)
    assert read(path) == ROWS
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"cannot read .* as Parquet"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', r"not JSON at line 2.*one JSON object per line"),
        ("rows.json", b'[{"a": 1},\n{"a": ]', r"not JSON at line 2"),
        ("rows.jsonl", b'{"a": 1}\n[1, 2]\n', "line 2 of .* is a list"),
        ("rows.json", b"[1]", "row 1 of .* is a int"),
        ("rows.jsonl", b'{"a": "\xff"}\n', r"not UTF-8 text \(byte 7 is 0xff\)"),
        ("rows.csv", b"a,b\n1,2\n1,2,3\n", "row 2 of .* more cells than the header"),
        ("rows.csv", b'a,b\n"1"x,2\n', "not CSV at line 2"),
        ("rows.jsonl.gz", b'{"a": 1}\n', "cannot read .*rows.jsonl.gz"),
        ("rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "cannot read .*rows.jsonl.gz"),
        ("rows.txt", b"text", r"not in a known format.*\.parquet"),
        ("rows.parquet.gz", b"text", "not in a known format"),
    ],
)
def test_files_that_are_not_what_they_seem(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.txt", "data/sub/missing"])
def test_missing_files(tmp_path, name):
    with pytest.raises(DataError, match=r"missing.*(does not exist|neither a file nor a data set id)"):
        read(tmp_path / name)


def test_folders(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("imdb", Hub("imdb", None, "train")),
        ("stanfordnlp/sst2", Hub("stanfordnlp/sst2", None, "train")),
        ("stanfordnlp/sst2:test", Hub("stanfordnlp/sst2", None, "test")),
        ("nyu-mll/glue:sst2:test", Hub("nyu-mll/glue", "sst2", "test")),
    ],
)
def test_data_set_ids(source, expected):
    assert locate(source, "train") == expected


def test_the_same_file_is_the_same_source(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(LINES)
    monkeypatch.chdir(tmp_path)
    assert locate("rows.jsonl", "train") == locate(str(tmp_path / "rows.jsonl"), "validation") != File(tmp_path)


@pytest.mark.parametrize(("name", "module"), [("rows.parquet", "pyarrow.parquet"), ("stanfordnlp/sst2", "datasets")])
def test_what_the_extra_is_for_is_said_where_it_is_missing(tmp_path, monkeypatch, name, module):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"pip install zotune\[datasets\]"):
        read(name)


def test_data_sets_that_cannot_be_had(monkeypatch):
    pytest.importorskip("datasets")
    # Nothing listens at this port of this machine.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(
        DataError, match=r"'zotune/no-such-data:train' is not in the local cache.*no network.*local files"
    ):
        read("zotune/no-such-data")
    assert time.monotonic() - began < 10
