"""Paths as people give them: as text or as a path object, perhaps from their home directory on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from zotune.errors import ConfigError, reason

StrPath = str | os.PathLike[str]
"""What every public function takes for a path."""


def expand(path: StrPath) -> Path:
    """A path that files are opened by, with the home directory in the place of ``~``; nothing need be there.

    Raises:
        ConfigError: Nothing can be there: there is no such user, a name is too long, or a folder is closed to us.
    """
    try:
        found = Path(path).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            found.stat()
    # Of a home directory that is not known, of a character that no path has, and of what is no path.
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot use the path {str(path)!r}: {reason(error)}; give another one") from error
    except OSError as error:
        why = error.strerror or reason(error)
        raise ConfigError(f"cannot use the path {os.fspath(path)!r}: {why}; give another one") from error
    return found
