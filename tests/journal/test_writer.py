from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import resource
import subprocess
import time
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
from zotune.journal import Change, Entry, Header, Journal, records
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
    assert journal.read(path)[:-1] == (HEADER, [entry], [], len(written), len(written), None)


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


def test_records_are_on_disk_a_second_after_the_last_time_and_when_it_is_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, synced = [5.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "fsync", synced.append)
    opened = Journal.create(path, HEADER)
    counts = [len(synced)]
    for step, seconds in enumerate((5.9, 6.0, 6.9, 7.5)):
        now[0] = seconds
        opened.append(replace(FIRST, step=step))
        counts.append(len(synced))
    opened.close()
    assert [*counts, len(synced)] == [1, 1, 2, 2, 3, 4]


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


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, "line 1, the header, is damaged|is not a journal"),
        (
            2,
            r"line 2 is damaged: .* \(step 1\). 0 steps before it can be recovered: 'zotune journal verify .* --rep",
        ),
        (3, r"line 3 is damaged: it does not match its checksum \(step 2\). 1 step before it"),
    ],
)
def test_damage_before_the_last_line_is_named(path: Path, number: int, expected: str) -> None:
    lines = write(path, FIRST, SKIPPED, replace(FIRST, step=2), replace(FIRST, step=3)).splitlines(keepends=True)
    good = lines[number - 1]
    for place in range(len(good)):
        for bit in (0, 6):
            damaged = bytearray(good)
            damaged[place] ^= 1 << bit
            path.write_bytes(b"".join([*lines[: number - 1], bytes(damaged), *lines[number:]]))
            with pytest.raises(JournalError, match=expected):
                journal.read(path)


def test_a_torn_header_leaves_nothing(path: Path) -> None:
    whole = write(path)
    for damaged in (whole[:-1], whole[:10]):
        path.write_bytes(damaged)
        with pytest.raises(JournalError, match="line 1, the header, is damaged, so that no step can be recovered"):
            Journal.open(path)


def test_carriage_returns_are_told_with_the_way_out(path: Path) -> None:
    whole = write(path, FIRST)
    path.write_bytes(whole.replace(b"\n", b"\r\n"))
    with pytest.raises(JournalError, match="nothing is lost") as refused:
        Journal.open(path)
    subprocess.run(str(refused.value).partition("e.g.: ")[2], shell=True, check=True)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content", [b"", b"output = 'runs/a'\n", b"\x89PNG\r\n\x1a\n\0\0", b'{"kind":"step"}\n', b"\n"]
)
def test_a_file_of_another_kind_is_no_journal(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(JournalError, match=r"journal\.jsonl is not a journal: its first line is no header"):
        Journal.open(path)
    assert path.read_bytes() == content


def test_a_checksummed_line_of_another_kind_is_no_journal(path: Path) -> None:
    for record in ({"step": 0}, {}):
        path.write_bytes(line(record))
        with pytest.raises(JournalError, match="is not a journal: its first line has no version"):
            Journal.open(path)


@pytest.mark.parametrize(("version", "advice"), [(2, "update zotune"), (0, "use the zotune that wrote it")])
def test_a_journal_of_another_version_is_refused(path: Path, version: int, advice: str) -> None:
    path.write_bytes(line(asdict(replace(HEADER, version=version)) | {"shards": 4}))
    expected = f"is a journal of version {version}; this zotune reads version 1: {advice}"
    with pytest.raises(JournalError, match=expected):
        Journal.open(path)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"step": 0, "losses": [0.5]}, "line 2 is damaged: it does not have the fields of version 1: coefficients"),
        ({**asdict(FIRST), "more": 1}, "line 2 .* more: Unexpected"),
        ({**asdict(FIRST), "lr": "fast"}, "line 2 .* lr: Input should be a valid number"),
        ({**asdict(FIRST), "losses": 0.5}, "line 2 .* losses: Input should be a valid"),
        ({"step": 0, "settings": {"seed": 4}}, "line 2 .* it changes 'seed', which holds for a whole run"),
        ({"step": 1, "settings": {"steps": 4}}, 'line 2 .* it has "step": 1 where 0 is due'),
    ],
)
def test_lines_of_other_fields_are_refused(path: Path, record: dict[str, Any], expected: str) -> None:
    path.write_bytes(line(asdict(HEADER)) + line(record))
    with pytest.raises(JournalError, match=expected):
        Journal.open(path)


def test_a_header_without_a_field_is_refused(path: Path) -> None:
    values = asdict(HEADER)
    del values["fold"]
    path.write_bytes(line(values) + line(asdict(FIRST)))
    with pytest.raises(JournalError, match="line 1 does not have the fields of version 1: fold: Field required"):
        Journal.open(path)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [((0, 2), r'line 3 .*"step": 2 where 1 is due \(step 2\)'), ((1,), 'line 2 .*"step": 1 where 0 is due')],
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


def test_changed_settings_hold_from_their_step_on(path: Path) -> None:
    faster = Change(1, {"method.lr": 0.25, "method.schedule": "linear"})
    longer = Change(2, {"steps": 99, "method.lr": 0.5})
    path.write_bytes(b"".join(map(records.line, (HEADER, FIRST, faster, SKIPPED, longer))))
    opened = Journal.open(path)
    assert (opened.entries[0], opened.changes) == (FIRST, [faster, longer])
    assert len(opened.entries) == 2
    assert opened.header_at(0) == HEADER
    now = replace(HEADER, method=asdict(Method(lr=0.25, schedule="linear")))
    assert opened.header_at(1) == now
    with pytest.raises(JournalError, match="its steps is not"):
        opened.require(replace(now, method=asdict(Method(lr=0.5, schedule="linear"))))
    opened.require(replace(now, method=asdict(Method(lr=0.5, schedule="linear")), steps=99))
    opened.claim()
    opened.append(replace(FIRST, step=2))
    opened.close()
    assert journal.read(path).entries[2].step == 2


def test_a_journal_replaced_while_it_is_claimed_is_left_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(path, FIRST)
    opened = Journal.open(path)
    other = path.with_name("other.jsonl")
    other.write_bytes(whole)
    monkeypatch.setattr(fcntl, "flock", lambda *_: os.replace(other, path))
    with pytest.raises(JournalError, match="changed since it was read"):
        opened.claim()
    assert path.read_bytes() == whole


def test_nobody_writes_while_a_journal_is_locked(path: Path) -> None:
    write(path, FIRST)
    opened = Journal.open(path)
    with journal.locked(path), pytest.raises(JournalError, match="another process is training"):
        opened.claim()
    opened.claim()
    with pytest.raises(JournalError, match="another process is training"), journal.locked(path):
        pass
    opened.close()


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


def test_where_there_are_no_locks_a_journal_that_grew_is_still_found(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    write(path, FIRST)
    first, second = Journal.open(path), Journal.open(path)
    monkeypatch.setattr(fcntl, "flock", without_locks)
    first.claim()
    first.append(SKIPPED)
    with pytest.raises(JournalError, match="changed since it was read"):
        second.claim()
    first.close()


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
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    opened = Journal.open(path)
    opened.claim()
    opened.append(FIRST)
    with disk_full_at(sound + room), pytest.raises(JournalError, match=f"{room} of|File too large"):
        opened.append(SKIPPED)
    opened.close()
    assert opened.entries == [FIRST]
    assert journal.read(path)[1] == [FIRST]


def test_a_disk_that_fails_is_told_and_the_journal_let_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    write(path, FIRST)
    opened, next_one = Journal.open(path), Journal.open(path)
    opened.claim()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(JournalError, match=r"cannot write to .*: Input/output error"):
            opened.close()
    next_one.claim()
    next_one.close()


def test_the_identity_of_steps_is_that_of_their_records_however_it_was_come_by(path: Path) -> None:
    entries = [Entry(step, (0.5 + step,), (1.5,), 1e-6, 7) for step in range(3)]
    opened = Journal.create(path, HEADER)
    known = [opened.identity(0)]
    for entry in entries:
        assert opened.identity(len(known)) is None
        opened.append(entry)
        known.append(opened.identity(len(known)))
    opened.close()
    assert len({*known, None}) == 5
    assert [journal.read(path).identity(step) for step in range(5)] == [*known, None]

    branch = [HEADER, *entries[:2], Change(2, {"method.lr": 0.5}), replace(entries[2], lr=0.5)]
    path.write_bytes(b"".join(map(records.line, branch)))
    assert [Journal.open(path).identity(step) == known[step] for step in range(4)] == [True, True, True, False]
    path.write_bytes(b"".join(map(records.line, [replace(HEADER, seed=4), *entries])))
    assert not {Journal.open(path).identity(step) for step in range(4)} & {*known}
