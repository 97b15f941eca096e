"""What is got ready for a step while a GPU works on the one before."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from zotune.directions import LowRankDirections
from zotune.layout import Site
from zotune.protocol import CLEAN, DirectionKey, Probe
from zotune.rows import Row
from zotune.runtimes.embedded.ahead import Ahead
from zotune.runtimes.packing import pack
from zotune.testing import tiny

KEY, OTHER = DirectionKey(0, 3, 0), DirectionKey(0, 4, 0)
ROWS, LESS = list(tiny.rows("single", 4, longest=9)), list(tiny.rows("single", 3, longest=9))


@pytest.fixture
def packed() -> list[tuple[list[Row], bool]]:
    """What was packed, in turn."""
    return []


@pytest.fixture
def directions() -> LowRankDirections:
    return LowRankDirections([Site("a", (4, 3)), Site("b", (5,))], seed=0, rank=2)


@pytest.fixture
def ahead(packed: list[Any], directions: LowRankDirections) -> Ahead:
    def make(rows: Sequence[Row], normalised: bool) -> Any:
        packed.append((list(rows), normalised))
        return pack(rows, normalised=normalised, spans=True)

    return Ahead(make, directions)


def test_what_was_expected_is_packed_once_and_not_when_it_is_asked_for(ahead: Ahead, packed: list[Any]) -> None:
    ahead.expect([Probe(KEY, 1, 1e-3)], ROWS, False)
    assert not packed
    ahead.get_ready()
    ahead.get_ready()
    found = ahead.pack(list(ROWS), False)
    assert packed == [(ROWS, False)]
    assert torch.equal(found.flat(), pack(ROWS, normalised=False, spans=True).flat())


@pytest.mark.parametrize(("rows", "normalised"), [(LESS, False), (ROWS, True), (ROWS[::-1], False)])
def test_what_was_not_expected_is_packed_when_it_is_asked_for(
    ahead: Ahead, packed: list[Any], rows: list[Row], normalised: bool
) -> None:
    ahead.expect([CLEAN], ROWS, False)
    ahead.get_ready()
    found = ahead.pack(rows, normalised)
    assert packed == [(ROWS, False), (rows, normalised)]
    assert torch.equal(found.flat(), pack(rows, normalised=normalised, spans=True).flat())


def test_directions_are_the_same_whether_or_not_they_were_expected(ahead: Ahead, directions: LowRankDirections) -> None:
    plain = [directions.streams(key).clone() for key in (KEY, OTHER)]
    ahead.expect([CLEAN, Probe(KEY, 1, 1e-3), Probe(KEY, -1, 1e-3)], ROWS, False)
    ahead.get_ready()
    assert directions.streams(KEY) is directions.streams(KEY)
    assert all(torch.equal(directions.streams(key), each) for key, each in zip((KEY, OTHER), plain, strict=True))
