"""Judging a written answer by the texts that are right: exact match and F1 of words, as for SQuAD.

Both are the measures of Rajpurkar et al. 2016 ("SQuAD: 100,000+ Questions for Machine Comprehension of Text", section
6.1), which MeZO's experiments use for SQuAD and DROP (Malladi et al. 2023). Of several right answers the one that fits
best counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, and with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Whether ``text`` is one of the answers once all are normalised; never, where there are no answers."""
    return normalise(text) in map(normalise, answers)


def f1(text: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the normalised words, between 0 and 1; 0 where there are no answers.

    Words count as often as they occur. Where text or answer has no words left, only the same of the other one fits.
    """
    return max((_f1(normalise(text).split(), normalise(answer).split()) for answer in answers), default=0.0)


def _f1(written: Sequence[str], right: Sequence[str]) -> float:
    if not written or not right:
        return float(written == right)
    common = (Counter(written) & Counter(right)).total()
    return 2 * common / (len(written) + len(right))
