"""DROP: answer a question about a passage that wants counting, adding or comparing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zotune.config import DataConfig
from zotune.tasks.base import MEZO, Task, rewrite, with_answers

if TYPE_CHECKING:
    from zotune.data.templates import Record


def _prepare(record: Record) -> Record:
    return with_answers(rewrite(record, question=str.strip), "answers_spans", "spans")


DROP = Task(
    name="drop",
    summary="write the answer to a question that wants reasoning over a passage",
    citation=f"Rows: Dua et al. 2019. Measures: Rajpurkar et al. 2016. {MEZO}",
    defaults=DataConfig(
        train="ucinlp/drop:train",
        validation="ucinlp/drop:validation",
        prompt="Passage: {passage}\nQuestion: {question}\nAnswer:",
        completion=" {answer}\n",
        answers="answers",
        train_size=1000,
        validation_size=1000,
    ),
    prepare=_prepare,
    metric="f1",
    deviations=(
        "as in MeZO, the spans of one answer count as several right answers, and DROP's own measure is not used",
    ),
)
