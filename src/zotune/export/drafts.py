"""Output that is there whole or not at all: made beside its place, and renamed when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from zotune.durable import draft_of
from zotune.errors import ConfigError, reason
from zotune.paths import StrPath, expand


def refuse_existing(out: StrPath) -> None:
    """Make sure that nothing is at ``out``.

    Raises:
        ConfigError: Something is, be it a link to nothing; it is not touched.
    """
    if os.path.lexists(expand(out)):
        raise ConfigError(f"the output {out} exists and is left as it is; give another path, or remove it")


@contextmanager
def drafted(out: StrPath, *, folder: bool) -> Iterator[Path]:
    """A path to write to, an empty folder if ``folder``, that becomes ``out`` when the block ends well.

    Raises:
        ConfigError: ``out`` exists, or cannot be written.
    """
    refuse_existing(out)
    out = expand(out)
    draft = draft_of(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            draft.mkdir()
        yield draft
        draft.rename(out)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or reason(error)}") from error
    except Exception as error:
        # What safetensors and tokenizers raise when a disk is full; the latter have no class for it.
        if type(error) not in (SafetensorError, Exception):
            raise
        raise ConfigError(f"cannot write {out}: {reason(error)}") from error
    finally:
        # Where nothing could be written, nothing can be removed either.
        with suppress(OSError):
            if draft.is_dir():
                shutil.rmtree(draft, ignore_errors=True)
            else:
                draft.unlink(missing_ok=True)


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(each.stat().st_size for each in files if each.is_file())
