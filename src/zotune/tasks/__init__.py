"""Built-in tasks. A new one is a file beside ``sst2.py`` and a name in this list."""

from __future__ import annotations

from zotune.tasks.base import Task
from zotune.tasks.sst2 import SST2

__all__ = ["TASKS", "Task"]

TASKS: dict[str, Task] = {task.name: task for task in (SST2,)}
