"""Properties of the journal's form: what is written is read, and damage never gives a wrong record."""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zotune import journal
from zotune.errors import JournalError
from zotune.journal import records
from zotune.journal.records import Change, Entry, Header
from zotune.optimizer import Method

HEADER = Header(3, asdict(Method()), 10, 4, "m" * 64, "l" * 64, "d" * 8, "master")
FIRST = Entry(0, (0.6931471805599453, 0.7), (-3.4264096927490234,), 1e-6, 2744632041)
SKIPPED = Entry(1, (math.nan, 0.5), (), 1e-6, 7)
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def journals(draw: st.DrawFn, most: int = 5) -> list[Header | Entry | Change]:
    """The records of a journal: a header, then steps with changes of settings before some of them."""
    method = asdict(Method(lr=draw(finite), rank=draw(st.integers(1, 9))))
    header = replace(HEADER, seed=draw(st.integers(0, 2**63)), method=method, model=draw(st.text()))
    drawn: list[Header | Entry | Change] = [header]
    for step in range(draw(st.integers(0, most))):
        if draw(st.booleans()):
            drawn.append(Change(step, {"method.lr": draw(finite), "steps": draw(st.integers(1, 99))}))
        losses, coefficients = draw(st.lists(finite, max_size=3)), draw(st.lists(finite, max_size=2))
        drawn.append(Entry(step, tuple(losses), tuple(coefficients), draw(finite), draw(st.integers(0, 2**32 - 1))))
    return drawn


@given(journals())
def test_any_journal_is_read_back(tmp_path_factory: pytest.TempPathFactory, drawn: list[Any]) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    path.write_bytes(b"".join(map(records.line, drawn)))
    read = journal.read(path)
    assert read.records(len(read.entries)) == drawn
    assert (read.sound, read.size, read.damage) == (path.stat().st_size, path.stat().st_size, None)


def reads_no_wrong_record(path: Path, damaged: bytes, drawn: list[Any]) -> None:
    """Either the first of the records that were written are read, or none at all."""
    path.write_bytes(damaged)
    try:
        contents = journal.read(path)
    except JournalError:
        return
    read = contents.records(len(contents.entries))
    assert read == drawn[: len(read)]
    assert b"".join(map(records.line, read)) == damaged[: contents.sound]


@settings(max_examples=20)
@given(journals(most=3))
def test_a_journal_cut_at_any_byte_gives_no_wrong_record(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Any]
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    whole = b"".join(map(records.line, drawn))
    for size in range(0, len(whole), 1 + len(whole) // 60):
        reads_no_wrong_record(path, whole[:size], drawn)


@settings(max_examples=20)
@given(journals(most=3), st.randoms(use_true_random=False))
def test_a_journal_with_a_byte_flipped_gives_no_wrong_record(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Any], random: Random
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    whole = b"".join(map(records.line, drawn))
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[random.randrange(len(whole))] ^= random.randrange(1, 256)
        reads_no_wrong_record(path, bytes(damaged), drawn)


def test_a_journal_cut_or_flipped_at_every_byte_gives_no_wrong_record(tmp_path: Path) -> None:
    drawn: list[Any] = [HEADER, FIRST, Change(1, {"method.lr": 0.5}), SKIPPED, replace(FIRST, step=2)]
    path, whole = tmp_path / "journal.jsonl", b"".join(map(records.line, drawn))
    for place in range(len(whole)):
        reads_no_wrong_record(path, whole[:place], drawn)
        for bit in (0, 5, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            reads_no_wrong_record(path, bytes(damaged), drawn)


@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_a_journal_error_or_dropped(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, behind_a_header: bool
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    path.write_bytes((records.line(HEADER) if behind_a_header else b"") + noise)
    try:
        read = journal.read(path)
    except JournalError:
        return
    assert behind_a_header
    assert (read.header, read.entries, read.changes) == (HEADER, [], [])


def test_a_header_that_is_nested_too_deeply_is_none(tmp_path: Path) -> None:
    body = b'{"seed":' * 9999
    path = tmp_path / "journal.jsonl"
    path.write_bytes(body + b',"crc":"%08x"}\n' % zlib.crc32(body + b"}"))
    with pytest.raises(JournalError, match="is not a journal: its first line has no version"):
        records.read(path)
