"""The records of a journal and their form: one line of JSON each, which ends in a checksum of the rest of it.

The first line is a `Header`, every other an `Entry` (a step) or a `Change` (settings that hold from there on).
"""

from __future__ import annotations

import json
import math
import shlex
import zlib
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from zotune.errors import JournalError
from zotune.figures import counted, finite, from_json

VERSION = 1

KEYS = {"steps": "train.steps", "batch_size": "train.batch_size", "seed": "train.seed", "fold": "runtime.fold"}
"""What a configuration calls fields of the header; the others have the same names."""

CHANGEABLE = ("method.lr", "method.eps", "method.schedule", "method.warmup_steps", "steps")
"""Fields of the header that a `Change` may set: no update of an earlier step depends on them."""

_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_STRICT = ConfigDict(extra="forbid", strict=True)
_MARK = b',"crc":"'


@dataclass(frozen=True)
class Header:
    """What a run is; a journal is only ever continued or replayed where all of it matches.

    Attributes:
        seed: Of directions, rounding and batch order.
        method: The method's fields.
        steps: Length of the run, which the schedule needs.
        batch_size: Examples per step.
        model: Fingerprint of the base weights.
        layout: Fingerprint of the sites.
        data: Fingerprint of the training examples.
        fold: How updates are folded.
        version: Of the format.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    seed: int
    method: dict[str, Any]
    steps: int
    batch_size: int
    model: str
    layout: str
    data: str
    fold: str
    version: int = VERSION


def _or_nan(loss: Any) -> Any:
    return math.nan if loss is None else loss


@dataclass(frozen=True)
class Entry:
    """One step.

    Attributes:
        step: Its number, from 0.
        losses: One per probe; not finite if the step was skipped.
        coefficients: One per direction; empty if the step was skipped.
        lr: Learning rate that was applied.
        batch: Checksum of the batch's example indices.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    step: int
    losses: tuple[Annotated[float, BeforeValidator(_or_nan)], ...]
    coefficients: tuple[float, ...]
    lr: float
    batch: int


@dataclass(frozen=True)
class Change:
    """Settings that hold from a step on.

    Attributes:
        step: The first step that has them, from 0.
        settings: Values by field of the header, such as ``method.lr``; only those that are `CHANGEABLE`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    step: int
    settings: dict[str, float | int | str]


_HEADER, _ENTRY, _CHANGE = TypeAdapter(Header), TypeAdapter(Entry), TypeAdapter(Change)


@dataclass(frozen=True)
class Damage:
    """The first line of a journal that does not count.

    Attributes:
        line: Its number, from 1.
        reason: What is wrong with it.
        torn: Whether it is what a crash may leave: the last line, cut short or garbled. Its step simply runs again.
    """

    line: int
    reason: str
    torn: bool

    def __str__(self) -> str:
        return f"line {self.line} is damaged: {self.reason}"


class Contents(NamedTuple):
    """What a journal's file holds.

    Attributes:
        header: The first line.
        entries: The steps, in order, as far as every line is sound.
        changes: The changes of settings among them.
        sound: Length of that part in bytes.
        size: Length of the file in bytes.
        damage: Where it ends, unless that is the end of the file.
        checks: CRC-32 of the header's line and those of the first so many steps, from 0.
    """

    header: Header
    entries: list[Entry]
    changes: list[Change]
    sound: int
    size: int
    damage: Damage | None
    checks: list[int]

    def identity(self, step: int) -> str | None:
        """What tells the first ``step`` steps from those of other runs; None if there are fewer.

        Branches have it in common for steps that they share. A change of settings does not count: no earlier step needs
        it, and what it does to a later one is on record there.
        """
        return f"{self.checks[step]:08x}" if step < len(self.checks) else None

    def header_at(self, step: int) -> Header:
        """The header with the settings that hold for ``step``, counted from 0."""
        header = self.header
        for change in self.changes:
            if change.step <= step:
                values = dict(change.settings)
                steps: Any = values.pop("steps", header.steps)
                method = {name.removeprefix("method."): value for name, value in values.items()}
                header = replace(header, method=header.method | method, steps=steps)
        return header

    def records(self, stop: int) -> list[Header | Entry | Change]:
        """The records up to ``stop`` steps in the order of the file, a change that holds from there on included."""
        steps: list[Entry | Change] = [
            *(change for change in self.changes if change.step <= stop),
            *self.entries[:stop],
        ]
        return [self.header, *sorted(steps, key=lambda record: (record.step, isinstance(record, Entry)))]


def line(record: Header | Entry | Change) -> bytes:
    """The line of a record, with null for losses that are not finite."""
    values = dict(vars(record))
    if isinstance(record, Entry):
        values["losses"] = list(map(finite, record.losses))
    body = _ENCODER.encode(values)
    return f'{body[:-1]},"crc":"{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def read(path: Path) -> Contents:
    """Read a journal; a torn last line is passed over.

    Raises:
        JournalError: See `scan`; or a line is damaged. The message names it and what can be recovered.
    """
    contents = scan(path)
    damage, steps = contents.damage, len(contents.entries)
    if damage is not None and not damage.torn:
        repair = shlex.join(["zotune", "journal", "verify", str(path.parent), "--repair"])
        raise JournalError(
            f"{path}: {damage} (step {steps + 1}). {counted(steps, 'step')} before it can be recovered: "
            f"'{repair}' goes back to them and keeps all that is there now."
        )
    return contents


def change_command(run: Path, step: int, field: str, value: Any) -> str:
    """The command line that sets a field that is `CHANGEABLE` from ``step`` on."""
    setting = f"{KEYS.get(field, field)}={value}"
    return shlex.join(["zotune", "rollback", str(run), "--step", str(step), "--set", setting])


def scan(path: Path) -> Contents:
    """Read a journal as far as it is sound.

    Raises:
        JournalError: It cannot be read, is no journal, is of another version, or its header is damaged.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise JournalError(f"cannot read the journal {path}: {error.strerror}") from error
    header = _header(path, lines[0] if lines else b"")
    entries: list[Entry] = []
    changes: list[Change] = []
    sound, damage, checks = len(lines[0]), None, [zlib.crc32(lines[0])]
    for number, text in enumerate(lines[1:], start=2):
        record = _record(text, len(entries))
        if isinstance(record, str):
            damage = Damage(number, record, torn=number == len(lines) and _checked(text) is None)
            break
        if isinstance(record, Entry):
            entries.append(record)
            checks.append(zlib.crc32(text, checks[-1]))
        else:
            changes.append(record)
        sound += len(text)
    return Contents(header, entries, changes, sound, sum(map(len, lines)), damage, checks)


def shared(a: Contents, b: Contents) -> int:
    """How many steps two journals have in common: the first so many records are equal."""
    pairs = zip(a.entries, b.entries, strict=False)
    return sum(1 for _ in takewhile(lambda pair: line(pair[0]) == line(pair[1]), pairs))


def differences(began: Header, now: Header) -> dict[str, tuple[Any, Any]]:
    """Both values of every field in which two headers differ, by name; the method's fields as ``method.lr``.

    The number of steps counts only where the schedule depends on it.
    """
    a, b = _fields(began), _fields(now)
    if now.method.get("schedule") == "constant":
        del b["steps"]
    return {name: (a.get(name), value) for name, value in b.items() if a.get(name) != value}


def _fields(header: Header) -> dict[str, Any]:
    values = asdict(header)
    return {**{f"method.{name}": value for name, value in values.pop("method").items()}, **values}


def _header(path: Path, text: bytes) -> Header:
    body = _checked(text)
    if body is None:
        if text.endswith(b"\r\n") and _checked(text.replace(b"\r", b"")) is not None:
            raise JournalError(
                f"{path}: a carriage return was put at the end of its lines, as by an editor or by git; nothing is "
                f"lost. Take them out, e.g.: sed -i 's/\\r$//' {shlex.quote(str(path))}"
            )
        if text.startswith(b'{"seed":'):
            raise JournalError(
                f"{path}: line 1, the header, is damaged, so that no step can be recovered from this file"
            )
        raise JournalError(f"{path} is not a journal: its first line is no header")
    try:
        version = from_json(body)["version"]
    except (ValueError, KeyError, TypeError):
        raise JournalError(f"{path} is not a journal: its first line has no version") from None
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        what_to_do = "update zotune" if newer else "use the zotune that wrote it (see manifest.json beside it)"
        raise JournalError(
            f"{path} is a journal of version {version!r}; this zotune reads version {VERSION}: {what_to_do}"
        )
    try:
        return _HEADER.validate_json(body)
    except ValidationError as error:
        raise JournalError(f"{path}: line 1 {_fault(error)}") from None


def _record(text: bytes, due: int) -> Entry | Change | str:
    """The record of a line where step ``due`` is the next one, or what is wrong with it."""
    body = _checked(text)
    if body is None:
        return "it does not match its checksum"
    try:
        # No entry has this text, because an entry has nothing but numbers.
        record = _CHANGE.validate_json(body) if b'"settings":' in body else _ENTRY.validate_json(body)
    except ValidationError as error:
        return f"it {_fault(error)}"
    if record.step != due:
        return f'it has "step": {record.step} where {due} is due'
    if isinstance(record, Change) and (foreign := sorted(set(record.settings).difference(CHANGEABLE))):
        return f"it changes {foreign[0]!r}, which holds for a whole run"
    return record


def _checked(text: bytes) -> bytes | None:
    """The JSON of a line without its checksum, or None if they do not match."""
    body, mark, check = text.rpartition(_MARK)
    body += b"}"
    return body if mark and check == f'{zlib.crc32(body):08x}"}}\n'.encode() else None


def _fault(error: ValidationError) -> str:
    """What is wrong with the fields of a record."""
    problem = error.errors()[0]
    field = ".".join(map(str, problem["loc"])) or "the record"
    return f"does not have the fields of version {VERSION}: {field}: {problem['msg']}"
