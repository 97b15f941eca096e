"""BoolQ: a yes/no question about a passage."""

from functools import partial

from zotune.config import DataConfig
from zotune.tasks.base import MEZO, Task, rewrite


def _as_sentence(question: str) -> str:
    return question[:1].upper() + question[1:].removesuffix("?") + "?"


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
    prepare=partial(rewrite, question=_as_sentence),
)
