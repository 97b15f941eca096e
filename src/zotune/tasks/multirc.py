"""MultiRC: is this an answer to a question about a paragraph?"""

from zotune.config import DataConfig
from zotune.tasks.base import MEZO, Task

MULTIRC = Task(
    name="multirc",
    summary="is this an answer to a question about a paragraph?",
    citation=f"Rows: Khashabi et al. 2018, as in SuperGLUE (Wang et al. 2019). {MEZO}",
    defaults=DataConfig(
        train="aps/super_glue:multirc:train",
        validation="aps/super_glue:multirc:validation",
        prompt=('{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n'),
        candidates=["No", "Yes"],
        label="label",
        train_size=1000,
        validation_size=1000,
    ),
)
