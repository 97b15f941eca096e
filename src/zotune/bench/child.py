"""Figures that need a process of their own, such as a start or a peak of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from zotune.errors import ZotuneError


def figures(module: str, side: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a module, run with a side's name and its settings as JSON, prints last: a line of JSON.

    Raises:
        ZotuneError: The process failed; the message has what it printed last.
    """
    command = [sys.executable, "-m", module, side, json.dumps(settings, default=str)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ZotuneError(f"measuring {side} in a process of its own failed: {last[0]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
