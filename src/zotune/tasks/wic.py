"""WiC: does a word mean the same in two sentences?"""

from zotune.config import DataConfig
from zotune.tasks.base import MEZO, Task

WIC = Task(
    name="wic",
    summary="does a word mean the same in two sentences?",
    citation=f"Rows: Pilehvar & Camacho-Collados 2019, as in SuperGLUE (Wang et al. 2019). {MEZO}",
    defaults=DataConfig(
        train="aps/super_glue:wic:train",
        validation="aps/super_glue:wic:validation",
        prompt=(
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n'
        ),
        candidates=["No", "Yes"],
        label="label",
        train_size=1000,
        validation_size=638,
    ),
)
