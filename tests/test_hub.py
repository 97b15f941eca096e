from __future__ import annotations

import time
from contextlib import suppress

import pytest

from zotune import hub

NOBODY = "http://127.0.0.1:9"
"""Nothing listens at this port of this machine."""


def test_a_hub_that_does_not_answer_is_known_soon_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NOBODY)
    began = time.monotonic()
    assert [hub.reachable() for _ in range(3)] == [False] * 3
    assert time.monotonic() - began < 2 * hub.TIMEOUT


def test_who_asks_to_be_offline_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub.reachable()
    with hub.offline(False):
        assert not hub.reachable()


def test_being_offline_ends_with_the_block_whatever_happens_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    seen = []
    with suppress(RuntimeError), hub.offline():
        seen.append(constants.HF_HUB_OFFLINE)
        raise RuntimeError
    assert [*seen, constants.HF_HUB_OFFLINE] == [True, False]
