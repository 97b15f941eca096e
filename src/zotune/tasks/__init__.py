"""Built-in tasks. A new one is a file beside ``sst2.py`` and a name in this list."""

from __future__ import annotations

from zotune.errors import ConfigError, unknown
from zotune.tasks.base import Task
from zotune.tasks.boolq import BOOLQ
from zotune.tasks.cb import CB
from zotune.tasks.copa import COPA
from zotune.tasks.drop import DROP
from zotune.tasks.multirc import MULTIRC
from zotune.tasks.rte import RTE
from zotune.tasks.squad import SQUAD
from zotune.tasks.sst2 import SST2
from zotune.tasks.wic import WIC
from zotune.tasks.wsc import WSC

__all__ = ["TASKS", "Task", "get"]

TASKS: dict[str, Task] = {task.name: task for task in (SST2, RTE, CB, BOOLQ, WIC, WSC, COPA, MULTIRC, SQUAD, DROP)}


def get(name: str) -> Task:
    """The task of this name.

    Raises:
        ConfigError: There is none; the message has the nearest name.
    """
    if name not in TASKS:
        raise ConfigError(unknown("task", name, TASKS))
    return TASKS[name]
