"""What a task is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from zotune.config import DataConfig

if TYPE_CHECKING:
    from zotune.data.templates import Record

MEZO = "Template: Malladi et al. 2023 (MeZO), Table 14."


def as_read(record: Record) -> Record:
    """Leave a row as it is."""
    return record


def rewrite(record: Record, **changes: Callable[[str], str]) -> Record:
    """The row with some of its text fields changed.

    Fields that are missing or hold no text stay as they are: the template that needs them says so, naming the row.
    """
    texts = {name: record[name] for name in changes if isinstance(record.get(name), str)}
    return {**record, **{name: changes[name](text) for name, text in texts.items()}}


def with_answers(record: Record, field: str, key: str) -> Record:
    """The row with the right texts, ``record[field][key]``, as ``answers``, and the first, to be learnt, as ``answer``.

    A field that holds a text or a list of texts itself will do. Without any, the row stays as it is.
    """
    found = record.get(field)
    texts = found.get(key) if isinstance(found, Mapping) else found
    texts = [texts] if isinstance(texts, str) else texts
    return {**record, "answers": texts, "answer": texts[0]} if isinstance(texts, list) and texts else record


@dataclass(frozen=True)
class Task:
    """A built-in task: what the table ``[data]`` says where the user does not.

    Attributes:
        name: What ``data.task`` calls it.
        summary: One line on what is to be learnt.
        citation: Where the rows and the template come from.
        defaults: The keys that the task sets; ``validation_size`` is that of its official validation split.
        prepare: Changes a row before the templates see it, for prompts that no template can say.
        metric: What it is judged by: ``accuracy``, or ``f1`` of what the model writes.
        deviations: Each way in which it departs from the source.
    """

    name: str
    summary: str
    citation: str
    defaults: DataConfig
    prepare: Callable[[Record], Record] = as_read
    metric: Literal["accuracy", "f1"] = "accuracy"
    deviations: tuple[str, ...] = ()

    def complete(self, config: DataConfig) -> DataConfig:
        """The configuration with this task's defaults for all that it leaves out.

        A user's own training rows are not paired with the task's validation split: without ``validation`` the rows to
        evaluate on are split off, and then the size of the official split does not apply either. Completing twice
        changes nothing.
        """
        chosen = {key: value for key, value in self.defaults if value is not None and getattr(config, key) is None}
        if config.train is not None:
            chosen.pop("validation", None)
            if config.validation is None:
                chosen.pop("validation_size", None)
        return config.model_copy(update=chosen)
