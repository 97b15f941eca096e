"""BoolQ: a yes/no question about a passage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zotune.config import DataConfig
from zotune.tasks.base import MEZO, Task, rewrite

if TYPE_CHECKING:
    from zotune.data.templates import Record


def _as_sentence(question: str) -> str:
    return question[:1].upper() + question[1:].removesuffix("?") + "?"


def _prepare(record: Record) -> Record:
    return rewrite(record, question=_as_sentence)


BOOLQ = Task(
    name="boolq",
    summary="is the answer to a question about a passage yes or no?",
    citation=f"Rows: Clark et al. 2019, as in SuperGLUE (Wang et al. 2019). {MEZO}",
    defaults=DataConfig(
        train="aps/super_glue:boolq:train",
        validation="aps/super_glue:boolq:validation",
        prompt="{passage} {question}",
        candidates=[" No", " Yes"],
        label="label",
        train_size=1000,
        validation_size=1000,
    ),
    prepare=_prepare,
)
