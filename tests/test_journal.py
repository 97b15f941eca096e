from __future__ import annotations

import json
import math
import resource
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zotune import journal
from zotune.errors import JournalError
from zotune.journal import Entry, Header, Journal
from zotune.optimizer import Method

HEADER = Header(
    seed=3,
    method=asdict(Method()),
    steps=10,
    batch_size=4,
    model="m" * 64,
    layout="l" * 64,
    data="d" * 8,
    fold="master",
)
FIRST = Entry(0, (0.6931471805599453, 0.7), (-3.4264096927490234,), 1e-6, 2744632041)
SKIPPED = Entry(1, (math.nan, 0.5), (), 1e-6, 7)
finite = st.floats(allow_nan=False, allow_infinity=False)


def write(path: Path, *entries: Entry, header: Header = HEADER) -> bytes:
    """Write a journal and return its bytes."""
    opened = Journal.create(path, header)
    for entry in entries:
        opened.append(entry)
    opened.close()
    return path.read_bytes()


def line(record: dict[str, Any]) -> bytes:
    """A line as the format is documented: the record, then the CRC-32 of the record without it."""
    body = json.dumps(record, separators=(",", ":"))
    return f'{body[:-1]},"crc":"{zlib.crc32(body.encode()):08x}"}}\n'.encode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


@given(losses=st.lists(finite, min_size=1), coefficients=st.lists(finite), lr=finite, batch=st.integers(0, 2**32 - 1))
def test_what_is_written_is_read_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, losses: list[float], coefficients: list[float], lr: float, batch: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    entry = Entry(0, tuple(losses), tuple(coefficients), lr, batch)
    written = write(path, entry)
    assert journal.read(path) == (HEADER, [entry], len(written), len(written))


def test_a_record_is_a_line_of_json_with_its_checksum(path: Path) -> None:
    lines = write(path, FIRST, SKIPPED).splitlines(keepends=True)
    assert lines == [
        line(asdict(HEADER)),
        line(
            {
                "step": 0,
                "losses": [0.6931471805599453, 0.7],
                "coefficients": [-3.4264096927490234],
                "lr": 1e-6,
                "batch": 2744632041,
            }
        ),
        line({"step": 1, "losses": [None, 0.5], "coefficients": [], "lr": 1e-6, "batch": 7}),
    ]


def test_a_skipped_step_comes_back_without_finite_losses(path: Path) -> None:
    write(path, FIRST, SKIPPED, Entry(2, (math.inf, -math.inf), (), 0.0, 1))
    _, skipped, infinite = journal.read(path)[1]
    assert skipped.coefficients == infinite.coefficients == ()
    assert math.isnan(skipped.losses[0])
    assert skipped.losses[1] == 0.5
    assert not any(map(math.isfinite, infinite.losses))


def test_a_thousand_steps_take_less_than_300_kilobytes(path: Path) -> None:
    entries = [
        Entry(n, (n / 7 + 1e-16, n / 11), ((n - 500) / 3e-3,), 1e-6 * n / 1000, 2**32 - 1 - n) for n in range(1000)
    ]
    assert len(write(path, *entries)) < 300_000


def test_a_record_is_in_the_file_when_append_returns(path: Path) -> None:
    opened = Journal.create(path, HEADER)
    opened.append(FIRST)
    assert journal.read(path)[1] == [FIRST]
    opened.close()


def test_steps_are_appended_in_their_order(path: Path) -> None:
    opened = Journal.create(path, HEADER)
    with pytest.raises(ValueError, match="step 1, but the next step is 0"):
        opened.append(SKIPPED)
    opened.append(FIRST)
    with pytest.raises(ValueError, match="step 0, but the next step is 1"):
        opened.append(FIRST)
    opened.close()
    assert journal.read(path)[1] == [FIRST]


def test_a_record_torn_at_any_byte_is_dropped_and_written_again(path: Path) -> None:
    whole = write(path, FIRST, SKIPPED)
    sound = whole.rindex(b"\n", 0, -1) + 1
    for size in range(sound, len(whole)):
        path.write_bytes(whole[:size])
        opened = Journal.open(path)
        assert (opened.entries, opened.dropped) == ([FIRST], size > sound)
        assert path.read_bytes() == whole[:size], "reading changes nothing"
        opened.claim()
        opened.append(SKIPPED)
        opened.close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"\xff\xfe", b'{"step":2}\n', b"\n"])
def test_whatever_a_power_cut_leaves_at_the_end_is_dropped(path: Path, tail: bytes) -> None:
    whole = write(path, FIRST, SKIPPED)
    path.write_bytes(whole + tail)
    opened = Journal.open(path)
    assert len(opened.entries) == 2
    assert opened.dropped
    opened.claim()
    opened.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("number", [1, 2, 3])
def test_damage_before_the_last_line_is_named(path: Path, number: int) -> None:
    lines = write(path, FIRST, SKIPPED, replace(FIRST, step=2), replace(FIRST, step=3)).splitlines(keepends=True)
    good = lines[number - 1]
    for place in range(len(good)):
        for bit in (0, 6):
            damaged = bytearray(good)
            damaged[place] ^= 1 << bit
            path.write_bytes(b"".join([*lines[: number - 1], bytes(damaged), *lines[number:]]))
            trusted = max(0, number - 2)
            with pytest.raises(JournalError, match=rf"line {number} of \d is damaged; the {trusted} steps before it"):
                journal.read(path)


def test_a_torn_header_is_no_journal(path: Path) -> None:
    whole = write(path)
    for damaged in (b"", whole[:-1], whole[:10]):
        path.write_bytes(damaged)
        with pytest.raises(JournalError, match=r"line 1 of [01] is damaged"):
            Journal.open(path)


def test_a_journal_of_another_version_is_refused(path: Path) -> None:
    path.write_bytes(line(asdict(replace(HEADER, version=2)) | {"shards": 4}))
    with pytest.raises(JournalError, match="is a journal of version 2; this zotune reads version 1"):
        Journal.open(path)


def test_lines_of_other_fields_are_refused(path: Path) -> None:
    path.write_bytes(line(asdict(HEADER)) + line({"step": 0, "losses": [0.5]}))
    with pytest.raises(JournalError, match="line 2 does not have the fields of version 1"):
        Journal.open(path)


@pytest.mark.parametrize(
    ("steps", "expected"), [((0, 2), "line 3 is step 2, but step 1 is due"), ((1,), "line 2 is step 1")]
)
def test_steps_out_of_order_are_refused(path: Path, steps: tuple[int, ...], expected: str) -> None:
    records = [asdict(replace(FIRST, step=step)) for step in steps]
    path.write_bytes(b"".join(map(line, [asdict(HEADER), *records])))
    with pytest.raises(JournalError, match=expected):
        Journal.open(path)


def test_a_missing_journal_is_named(path: Path) -> None:
    with pytest.raises(JournalError, match=r"cannot read the journal .*journal\.jsonl: No such file"):
        Journal.open(path)


def test_a_journal_is_not_begun_twice(path: Path) -> None:
    whole = write(path, FIRST)
    with pytest.raises(FileExistsError):
        Journal.create(path, HEADER)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 4}, r"its seed is not what it began with \(journal: 3, now: 4\)"),
        ({"model": "x"}, "its model is not"),
        ({"data": "x"}, "its data is not"),
        ({"batch_size": 5}, "its batch_size is not"),
        ({"fold": "stochastic"}, "its fold is not"),
        ({"method": asdict(Method(lr=0.5))}, r"its method\.lr is not what it began with \(journal: 1e-06, now: 0.5\)"),
        ({"method": asdict(Method(schedule="linear"))}, "its method.schedule is not"),
    ],
)
def test_a_run_goes_on_only_as_what_it_began(path: Path, change: dict[str, Any], expected: str) -> None:
    write(path, FIRST)
    Journal.open(path).require(HEADER)
    with pytest.raises(JournalError, match=expected):
        Journal.open(path).require(replace(HEADER, **change))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_number_of_steps_may_change_only_where_it_changes_no_update(path: Path, schedule: Any) -> None:
    header = replace(HEADER, method=asdict(Method(schedule=schedule)))
    write(path, FIRST, header=header)
    longer = replace(header, steps=99)
    if schedule == "constant":
        Journal.open(path).require(longer)
    else:
        with pytest.raises(JournalError, match=r"its steps is not what it began with \(journal: 10, now: 99\)"):
            Journal.open(path).require(longer)


def test_one_process_at_a_time_writes(path: Path) -> None:
    first = Journal.create(path, HEADER)
    second = Journal.open(path)
    with pytest.raises(JournalError, match="another process is training in"):
        second.claim()
    first.append(FIRST)
    first.close()
    with pytest.raises(JournalError, match="changed since it was read"):
        second.claim()
    third = Journal.open(path)
    third.claim()
    third.close()
    assert journal.read(path)[1] == [FIRST]


def test_a_journal_that_was_only_read_takes_no_record(path: Path) -> None:
    whole = write(path, FIRST)
    with pytest.raises(ValueError, match="claim it first"):
        Journal.open(path).append(SKIPPED)
    assert path.read_bytes() == whole


@contextmanager
def disk_full_at(size: int) -> Iterator[None]:
    """Let files grow to ``size`` bytes and no further; Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 1, 50])
def test_a_full_disk_is_an_error_before_the_step_counts(path: Path, room: int) -> None:
    whole = write(path, FIRST, SKIPPED)
    sound = whole.rindex(b"\n", 0, -1) + 1
    path.write_bytes(whole[:sound])
    opened = Journal.open(path)
    opened.claim()
    with disk_full_at(sound + room), pytest.raises(JournalError, match=f"{room} of|File too large"):
        opened.append(SKIPPED)
    opened.close()
    assert opened.entries == [FIRST]
    assert journal.read(path)[1] == [FIRST]
