"""CommitmentBank: does a text entail a clause of it, contradict it, or neither?"""

from zotune.config import DataConfig
from zotune.tasks.base import MEZO, Task

CB = Task(
    name="cb",
    summary="does a text entail a clause of it, contradict it, or neither?",
    citation=f"Rows: de Marneffe et al. 2019, as in SuperGLUE (Wang et al. 2019). {MEZO}",
    defaults=DataConfig(
        train="aps/super_glue:cb:train",
        validation="aps/super_glue:cb:validation",
        prompt='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        candidates=["Yes", "No", "Maybe"],
        label="label",
        # Of 250 rows MeZO keeps 100 for development.
        train_size=150,
        validation_size=56,
    ),
)
