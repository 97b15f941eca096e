"""What a task is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zotune.config import DataConfig

if TYPE_CHECKING:
    from zotune.data.templates import Record


def as_read(record: Record) -> Record:
    """Leave a row as it is."""
    return record


@dataclass(frozen=True)
class Task:
    """A built-in task: what the table ``[data]`` says where the user does not.

    Attributes:
        name: What ``data.task`` calls it.
        summary: One line on what is to be learnt.
        citation: Where the rows, the template and the splits come from.
        defaults: The keys that the task sets; ``validation_size`` is that of its official validation split.
        prepare: Changes a row before the templates see it, for prompts that no template can say.
    """

    name: str
    summary: str
    citation: str
    defaults: DataConfig
    prepare: Callable[[Record], Record] = as_read

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
