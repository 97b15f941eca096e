"""SST-2: is a sentence from a film review negative or positive?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zotune.config import DataConfig
from zotune.tasks.base import Task

if TYPE_CHECKING:
    from zotune.data.templates import Record


def _strip(record: Record) -> Record:
    # The official rows end in a space, which would stand twice before the template's next word.
    return {name: value.strip() if isinstance(value, str) else value for name, value in record.items()}


SST2 = Task(
    name="sst2",
    summary="is a sentence of a film review negative or positive?",
    citation=(
        "Rows: Socher et al. 2013, as in GLUE (Wang et al. 2019). Template and splits: Malladi et al. 2023 (MeZO). "
        "Training rows of a user's own split into 1000 for training and the next 500 for validation."
    ),
    defaults=DataConfig(
        train="stanfordnlp/sst2:train",
        validation="stanfordnlp/sst2:validation",
        prompt="{sentence} It was",
        candidates=[" terrible", " great"],
        label="label",
        train_size=1000,
        validation_size=872,
    ),
    prepare=_strip,
)
