"""Writing that a crash cannot spoil."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def draft_of(path: Path) -> Path:
    """A hidden name beside a path, for what takes its place when it is complete.

    No other process has it: neither one in another container, which may have the same number and the same volume, nor
    one that was killed and left its draft.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


def replace(path: Path, content: bytes) -> None:
    """Put a file in the place of another, whole or not at all."""
    draft = draft_of(path)
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
