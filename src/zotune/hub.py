"""The Hugging Face hub: whether it can be reached, asked once and briefly.

Its libraries wait and retry for most of a minute before they say that there is no network.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from threading import Thread
from typing import Any

TIMEOUT = 5.0
"""Seconds that the hub has to answer."""

WITHOUT = "there is no network, it is down, or HF_HUB_OFFLINE is set"


def reachable() -> bool:
    """Whether the hub may be asked and answers at all; a network that was seen once is taken to stay."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)


@lru_cache
def _answers(endpoint: str) -> bool:
    from huggingface_hub.utils import get_session

    answers: list[object] = []

    def ask() -> None:
        # Whatever the HTTP library of the day raises: nothing came back.
        with suppress(Exception):
            answers.append(get_session().head(endpoint, timeout=TIMEOUT))

    # Looking up a name has no timeout of its own.
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(TIMEOUT)
    return bool(answers)


@contextmanager
def offline(wanted: bool = True) -> Iterator[None]:
    """Have the hub's libraries look in their caches only, while ``wanted``."""
    from huggingface_hub import constants

    # `datasets` copies the switch when it is imported.
    switches: list[Any] = [constants, *(sys.modules[name] for name in ("datasets.config",) if name in sys.modules)]
    before = [module.HF_HUB_OFFLINE for module in switches]
    for module in switches:
        module.HF_HUB_OFFLINE = module.HF_HUB_OFFLINE or wanted
    try:
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value
