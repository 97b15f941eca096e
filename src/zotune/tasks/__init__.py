"""Built-in tasks. A new one is a file beside ``sst2.py`` and a name in this list."""

from __future__ import annotations

from zotune.errors import ConfigError, unknown
from zotune.tasks.base import Task
from zotune.tasks.sst2 import SST2

__all__ = ["TASKS", "Task", "get"]

TASKS: dict[str, Task] = {task.name: task for task in (SST2,)}


def get(name: str) -> Task:
    """The task of this name.

    Raises:
        ConfigError: There is none; the message has the nearest name.
    """
    if name not in TASKS:
        raise ConfigError(unknown("task", name, TASKS))
    return TASKS[name]
