"""The settings of a run beside its journal: what its header says of them, and which may change on the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from zotune.config import AUTO, Config, load, parse
from zotune.errors import ConfigError, listed
from zotune.journal.records import CHANGEABLE, KEYS, Change, Header, change_command, differences, read
from zotune.presets import resolve

_WHOLE_RUN = ("output", "model", "data")
"""Parts of a configuration that every step depends on."""


def configured(header: Header, config: Config) -> Header:
    """The header of a run on the same model and data that is configured like this.

    Raises:
        ConfigError: The preset is unknown, or a value has no meaning for it.
    """
    return replace(
        header,
        seed=config.train.seed,
        method=asdict(resolve(config.method)),
        steps=config.train.steps,
        batch_size=config.train.batch_size,
        fold=config.runtime.fold,
    )


def changed(file: Path, header: Header, step: int, overrides: Sequence[str]) -> tuple[Config, Change | None]:
    """A run's configuration from ``step`` on, and what its journal must say of that.

    `zotune.journal.records.CHANGEABLE` may change, and so may all that changes no update: when to evaluate, save and
    stop, who is told, and what computes.

    Args:
        file: The configuration, which may be that of a later step.
        header: With the settings that hold at ``step``.
        step: The first step, from 0, that ``overrides`` hold for.
        overrides: Assignments as `zotune.config.load` takes them.

    Returns:
        The configuration with the header's settings and ``overrides``; None if the latter change no step.

    Raises:
        ConfigError: A setting is unknown, or holds for a whole run.
    """
    as_it_was = _assignments(header)
    before, after = load(file, as_it_was), load(file, [*as_it_was, *listed(overrides, "overrides")])
    if after.method.lr == AUTO:
        raise ConfigError("method.lr = 'auto' is chosen when a run begins; from a later step on, give a number")
    found = {name: new for name, (_, new) in differences(header, configured(header, after)).items()}
    fixed = [name for name in _WHOLE_RUN if getattr(before, name) != getattr(after, name)]
    if before.method.preset != after.method.preset:
        fixed.append("method.preset")
    fixed += [KEYS.get(name, name) for name in found if name not in CHANGEABLE]
    if fixed:
        raise ConfigError(
            f"{fixed[0]} cannot change at step {step}: the journal is a way from one base model with one kind of "
            f"update, on one order of batches. Begin another run for that. {_what_may_change()}"
        )
    if after.train.steps < step:
        raise ConfigError(f"train.steps = {after.train.steps} is less than the {step} steps that stay")
    return after, Change(step, found) if found else None


def of_length(config: Config, steps: int, journal: Path) -> Config:
    """A run's configuration with another number of steps, as long as no rate that was or is to be depends on it.

    Args:
        config: As it is.
        steps: How many the run is to have.
        journal: The run's, in its directory.

    Raises:
        ConfigError: It is no number of steps, or the schedule depends on it.
        JournalError: The latter, and the journal is damaged.
    """
    longer = parse(config.model_dump() | {"train": config.train.model_dump() | {"steps": steps}}, "resume")
    if longer != config and resolve(config.method).schedule != "constant":
        command = change_command(journal.parent, len(read(journal).entries), "steps", steps)
        raise ConfigError(
            "--steps needs a constant schedule: another length changes the learning rate of every step. To have the "
            f"schedule of that length from here on: '{command}', then resume."
        )
    return longer


def _assignments(header: Header) -> list[str]:
    """What a configuration must be given to have the settings of a header."""
    values = {name: header.method[name.removeprefix("method.")] for name in CHANGEABLE if name != "steps"}
    # With a constant schedule a run may have been extended, which its header need not say.
    if header.method["schedule"] != "constant":
        values["steps"] = header.steps
    return [f"{KEYS.get(name, name)}={json.dumps(value)}" for name, value in values.items()]


def _what_may_change() -> str:
    names = ", ".join(KEYS.get(name, name) for name in CHANGEABLE)
    rest = "when [train] evaluates, saves and stops early; [track]; and [runtime] but for fold"
    return f"These may change: {names}; {rest}."
