"""The exceptions of zotune: one tree, so that a caller can catch what is theirs to mend.

Every message says what was got, what is allowed and what to do. The command line prints it as one line, without a
traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class ZotuneError(Exception):
    """Base of every error that zotune raises on purpose."""


class ConfigError(ZotuneError):
    """A configuration names something unknown or asks for something impossible."""


class DataError(ZotuneError):
    """A data file, a template or a row cannot be used as asked."""


class ModelError(ZotuneError):
    """A model cannot be loaded, or a part of it cannot be tuned as asked."""


class EngineError(ZotuneError):
    """An inference engine failed or died, or does not run what it should."""


class NonFiniteLossError(ZotuneError):
    """A probe's loss is NaN or infinite, so the step has no estimate."""


class DivergedError(ZotuneError):
    """Too many steps in a row had a non-finite loss."""


class StopRun(ZotuneError):
    """Raised by a callback from ``step`` or ``evaluation``: the run ends early and cleanly, for the reason given."""


class CallbackError(ZotuneError):
    """A callback failed; the message names it. The run has every finished step."""


class JournalError(ZotuneError):
    """A journal or checkpoint is missing, damaged or belongs to something else."""


class RunExistsError(ZotuneError):
    """A run directory is already there, and nothing said to resume it."""


def reason(error: Exception) -> str:
    """The message of another library's exception on one line, without its full stop; its type where it says nothing."""
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")


def first_line(error: Exception) -> str:
    """The first line of a message of another library, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def unknown(kind: str, got: str, allowed: Iterable[str]) -> str:
    """Message for an unknown name: what was got, the nearest valid name if there is one, and all valid names."""
    names = sorted(allowed)
    close = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {got!r}.{hint} Known: {', '.join(names)}."


def listed(given: Sequence[T], name: str) -> Sequence[T]:
    """What was given, if it is not one text where several are meant, whose characters would be taken for them.

    Raises:
        ConfigError: It is.
    """
    if isinstance(given, str):
        raise ConfigError(f"{name} must be a list, not {given!r}")
    return given


def required(given: Any, kind: type[T], hint: str) -> T:
    """What was given, if it is of this kind: a mistake in a script is told where it is made.

    Raises:
        ConfigError: It is something else; the message has the hint.
    """
    if isinstance(given, kind):
        return given
    raise ConfigError(f"got a {type(given).__name__} where a {kind.__name__} is needed: {hint}")
