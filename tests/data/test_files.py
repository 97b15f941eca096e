import csv
import gzip
import io
import json
from contextlib import suppress
from datetime import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zotune.data.files import CsvRows, JsonLines, TextFile, read
from zotune.data.templates import lookup
from zotune.errors import DataError

ROWS = [{"text": "café", "n": 1}, {"text": "a film\u2028of two lines 😀", "n": 2}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)

fixture_per_test = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=8)


def rows_of(path):
    return list(read(path, path.suffix))


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-be-bom", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.jsonl.gz"])
def test_encodings_that_say_what_they_are(tmp_path, codec, name):
    marked = codec.endswith("-bom")
    text = LINES if "jsonl" in name else 'text,n\ncafé,1\n"a film\u2028of two lines 😀",2\n'
    raw = (("\ufeff" + text) if marked else text).encode(codec.removesuffix("-bom"))
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    found = read(path, ".csv" if name.endswith(".csv") else ".jsonl")
    assert [dict(row, n=int(row["n"])) for row in found] == ROWS


@pytest.mark.parametrize(
    ("raw", "byte"),
    [(LINES.encode("latin-1", "replace"), "byte 13 is 0xe9"), (LINES.encode("utf-16-le"), "byte 1 is 0x00")],
)
def test_other_encodings_are_refused_with_the_byte_and_the_way_out(tmp_path, raw, byte):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"not UTF-8 text \({byte}\).*iconv -f LATIN1 -t UTF-8 rows\.jsonl"):
        rows_of(path)
    assert path.read_bytes() == raw


def test_a_byte_is_counted_from_the_files_beginning(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbftext,n\nfine,1\n\xff,2\n")
    with pytest.raises(DataError, match="byte 17 is 0xff"):
        rows_of(path)


@fixture_per_test
@given(rows=st.lists(st.dictionaries(cells, cells | st.integers() | st.none()), max_size=5), data=st.data())
def test_json_lines_are_read_in_any_order(tmp_path, rows, data):
    path = tmp_path / "rows.jsonl"
    blanks = data.draw(st.lists(st.sampled_from(["", "\n", " \r\n", "\t\n"]), min_size=len(rows), max_size=len(rows)))
    texts = (blank + json.dumps(row, ensure_ascii=False) for blank, row in zip(blanks, rows, strict=True))
    path.write_text("\n".join(texts), encoding="utf-8", newline="")
    found = JsonLines(TextFile.of(path))
    assert len(found) == len(rows)
    for index in data.draw(st.permutations(range(len(rows)))):
        assert found[index] == rows[index]


@fixture_per_test
@given(rows=st.lists(st.lists(cells, min_size=2, max_size=2), max_size=5), end=st.sampled_from(["\n", "\r\n"]))
def test_csv_is_read_as_the_library_reads_it_from_the_last_row_on(tmp_path, rows, end):
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *rows])
    path = tmp_path / "rows.csv"
    path.write_text(out.getvalue(), encoding="utf-8", newline="")
    found = CsvRows(TextFile.of(path))
    assert [found[index] for index in reversed(range(len(found)))][::-1] == list(
        csv.DictReader(io.StringIO(out.getvalue(), newline=""))
    )


def test_short_csv_rows_have_nothing_in_their_last_cells(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n\n1\n")
    assert rows_of(tmp_path / "rows.csv") == [{"a": "1", "b": None}]


def test_a_csv_column_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label,text\na,1,b\n")
    with pytest.raises(DataError, match=r"rows\.csv: column 'text' is there twice \(columns 1 and 3\); rename one\."):
        rows_of(path)
    path.write_text("text,,\na,,\n")
    assert rows_of(path) == [{"text": "a", "": ""}]


def test_csv_cells_of_any_length_are_read_and_pythons_limit_stays(tmp_path):
    limit, long = csv.field_size_limit(), "a film, " * 50_000
    path = tmp_path / "rows.csv"
    path.write_text(f'text,n\n"{long}",1\nb,2\n')
    assert rows_of(path) == [{"text": long, "n": "1"}, {"text": "b", "n": "2"}]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(("raw", "line"), [("text,n\ra,1\rb,2\r", 1), ("text,n\na,1\nb\rc,2\n", 3)])
def test_lone_carriage_returns_are_refused_with_the_way_out(tmp_path, raw, line):
    path = tmp_path / "rows.csv"
    path.write_text(raw, newline="")
    found = (
        rf"carriage return without a line feed outside of quotes in line {line}\..*tr '\\r' '\\n' < rows\.csv > lines"
    )
    with pytest.raises(DataError, match=found):
        rows_of(path)


def test_a_bad_line_is_counted_only_when_it_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": 1}\n\n{"a": \n{"a": 3}\n')
    found = read(path, ".jsonl")
    assert (len(found), found[0], found[2]) == (3, {"a": 1}, {"a": 3})
    with pytest.raises(DataError, match="not JSON at line 4: "):
        found[1]


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5000, '{"a": ' * 100_000])
def test_lines_that_break_the_parser(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + line)
    with pytest.raises(DataError, match=r"at line 2|line 2 of .* is a"):
        rows_of(path)


def test_row_groups_of_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"film {number}", "answers": [str(number)]} for number in range(10)]
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=3)
    found = read(path, ".parquet")
    assert len(found) == 10
    assert [found[index] for index in (9, 0, 5, 4)] == [rows[index] for index in (9, 0, 5, 4)]
    with pytest.raises(IndexError):
        found[10]


def test_a_parquet_column_that_is_there_twice_is_refused(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.table([["a"], [0], [1]], names=["text", "label", "label"]), path)
    with pytest.raises(DataError, match=r"rows\.parquet: column 'label' is there twice \(columns 2 and 3\); rename"):
        read(path, ".parquet")


def test_a_parquet_cell_that_python_cannot_hold_costs_nothing_but_itself(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    far = arrow.array([0, 2**58], arrow.timestamp("us"))
    parquet.write_table(arrow.table([["fine", "dull"], [1, 0], far], names=["text", "label", "far"]), path)
    early, late = rows_of(path)
    assert early == {"text": "fine", "label": 1, "far": datetime(1970, 1, 1)}
    assert (late["text"], late["label"]) == ("dull", 0)
    with pytest.raises(DataError, match=r"row 2: the field 'far' holds what Python cannot hold \(.+\); it must hold"):
        lookup(late, "far", "row 2", "data.prompt")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raw=st.binary(max_size=60) | st.text('{}[]",:\n\\ud8a1e0nul\r', max_size=40).map(str.encode),
    name=st.sampled_from(["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz", "rows.parquet"]),
    wrap=st.sampled_from([bytes, gzip.compress]),
)
def test_any_bytes_give_rows_or_an_error_of_ours(tmp_path, raw, name, wrap):
    path = tmp_path / name
    path.write_bytes(wrap(raw))
    before = path.read_bytes()
    with suppress(DataError):
        assert all(isinstance(row, dict) for row in read(path, "." + name.split(".")[1]))
    assert path.read_bytes() == before
