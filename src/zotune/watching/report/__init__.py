"""The report of a run: one HTML page that needs nothing else, neither a network nor a script."""

from __future__ import annotations

from pathlib import Path

from zotune import durable
from zotune.errors import ConfigError
from zotune.paths import StrPath, expand
from zotune.watching.report.gather import gather
from zotune.watching.report.render import render

__all__ = ["write"]


def write(run: StrPath, out: StrPath | None = None) -> Path:
    """Write the report of a run; nothing else in its directory changes.

    Args:
        run: The run directory; it may still be at work.
        out: The page. Default: ``report.html`` in the run directory.

    Returns:
        Where the page is.

    Raises:
        JournalError: It is no run, or its journal or metrics cannot be read.
        ConfigError: The page cannot be written.
    """
    # Text of a user's rows may hold what no encoding has, such as half of a surrogate pair.
    folder = expand(run)
    page = render(gather(folder)).encode("utf-8", "replace")
    place = folder / "report.html" if out is None else expand(out)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        durable.replace(place, page)
    except OSError as error:
        raise ConfigError(f"cannot write the report {place}: {error.strerror or error}") from error
    return place
