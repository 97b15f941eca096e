"""COPA: which of two sentences is the cause or the effect of another?"""

from functools import partial

from zotune.config import DataConfig
from zotune.errors import DataError
from zotune.tasks.base import MEZO, Task, rewrite

CONJUNCTIONS = {"cause": "because", "effect": "so"}


def _conjunction(question: str) -> str:
    if question not in CONJUNCTIONS:
        raise DataError(f"COPA's field 'question' is 'cause' or 'effect'; one row has {question!r}.")
    return CONJUNCTIONS[question]


def _without_full_stop(premise: str) -> str:
    return premise.rstrip().removesuffix(".")


def _continuing(choice: str) -> str:
    """The sentence as it reads after a conjunction: its first word in lower case, but for the pronoun."""
    first, space, rest = choice.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


COPA = Task(
    name="copa",
    summary="which of two sentences is the cause or effect of another?",
    citation=f"Rows: Roemmele et al. 2011, as in SuperGLUE (Wang et al. 2019). {MEZO}",
    defaults=DataConfig(
        train="aps/super_glue:copa:train",
        validation="aps/super_glue:copa:validation",
        prompt="{premise} {question}",
        candidates=[" {choice1}", " {choice2}"],
        label="label",
        loss="gold",
        # Of 400 rows MeZO keeps 100 for development.
        train_size=300,
        validation_size=100,
    ),
    prepare=partial(
        rewrite, premise=_without_full_stop, question=_conjunction, choice1=_continuing, choice2=_continuing
    ),
)
