"""RTE: does one text entail another?"""

from zotune.config import DataConfig
from zotune.tasks.base import MEZO, Task

RTE = Task(
    name="rte",
    summary="does one text entail another?",
    citation=f"Rows: Dagan et al. 2005 and later rounds, as in SuperGLUE (Wang et al. 2019). {MEZO}",
    defaults=DataConfig(
        train="aps/super_glue:rte:train",
        validation="aps/super_glue:rte:validation",
        prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        candidates=["Yes", "No"],
        label="label",
        train_size=1000,
        validation_size=277,
    ),
)
