"""Paths as people give them: as text or as a path object, perhaps from their home directory on."""

from __future__ import annotations

import os
from pathlib import Path

StrPath = str | os.PathLike[str]
"""What every public function takes for a path."""


def expand(path: StrPath) -> Path:
    """A path that files are opened by, with the home directory in the place of ``~``."""
    return Path(path).expanduser()
