from __future__ import annotations

from typing import Any

import pytest

from zotune.optimizer import Method
from zotune.runtimes.engine.tuner import directions_at_once


@pytest.mark.parametrize(
    ("method", "asked", "found"),
    [({}, 4, 4), ({}, 20, 16), ({"family": "dense", "lora_rank": 2}, 20, 16), ({"family": "dense"}, 20, 1)],
    ids=["low-rank", "many", "LoRA", "dense"],
)
def test_directions_as_large_as_the_weights_have_a_forward_each(method: Any, asked: int, found: int) -> None:
    assert directions_at_once(Method(directions=asked, **method)) == found
