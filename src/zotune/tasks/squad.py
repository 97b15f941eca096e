"""SQuAD: answer a question about a paragraph with words from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zotune.config import DataConfig
from zotune.tasks.base import MEZO, Task, rewrite, with_answers

if TYPE_CHECKING:
    from zotune.data.templates import Record


def _prepare(record: Record) -> Record:
    return with_answers(rewrite(record, question=str.strip), "answers", "text")


SQUAD = Task(
    name="squad",
    summary="write the answer to a question in words of a paragraph",
    citation=f"Rows and measures: Rajpurkar et al. 2016. {MEZO}",
    defaults=DataConfig(
        train="rajpurkar/squad:train",
        validation="rajpurkar/squad:validation",
        prompt="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
        completion=" {answer}\n",
        answers="answers",
        train_size=1000,
        validation_size=1000,
    ),
    prepare=_prepare,
    metric="f1",
)
