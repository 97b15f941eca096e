"""WSC: does a pronoun refer to a name?"""

from functools import partial

from zotune.config import DataConfig
from zotune.tasks.base import MEZO, Task, rewrite

WSC = Task(
    name="wsc",
    summary="does a pronoun refer to this noun phrase?",
    citation=f"Rows: Levesque et al. 2012, as in SuperGLUE (Wang et al. 2019). {MEZO}",
    defaults=DataConfig(
        train="aps/super_glue:wsc.fixed:train",
        validation="aps/super_glue:wsc.fixed:validation",
        prompt=(
            '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n'
        ),
        candidates=["No", "Yes"],
        label="label",
        train_size=454,
        validation_size=104,
    ),
    prepare=partial(rewrite, span2_text=str.lower),
    deviations=("454 of the 554 rows are for training; MeZO's script keeps 500 of them for development",),
)
