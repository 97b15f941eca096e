"""Whether a model reads a pack as rows apart, tried once with a few tokens.

Rows of a pack are kept apart in attention that goes through transformers' interface. A model whose tokens meet
otherwise, by a recurrence, a convolution or attention of its own, or which says in a mask what no pack knows of, would
give wrong scores and no error. So what packs give is compared with the model's own forward, and with itself beside
another row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from zotune.errors import ModelError, reason
from zotune.rows import Candidate, Row

Scores = Callable[[Sequence[Row]], np.ndarray]
"""Scores of the candidates of rows in one pack, float32 ``(candidates,)``, up to a constant of each row."""

_APART, _APART_IN_16_BITS = 1e-4, 5e-3
"""How far a row's scores may move beside another row, over one plus their size: experts alone round differently."""

_OWN, _OWN_IN_16_BITS = 1e-2, 0.15
"""How far they may be from the model's own, likewise: correct programs in 16 bits differ by some hundredths."""


class Trial:
    """What a model's own forward gives, before anything of it is wrapped.

    Args:
        model: In evaluation mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._name, self._exact = type(model).__name__, model.dtype == torch.float32
        vocabulary = model.config.get_text_config().vocab_size
        # From the middle, because the ends have tokens with a meaning of their own.
        tokens = tuple((vocabulary // 3 + each) % vocabulary for each in range(24))
        # Of one token each, whose rows of the head are little memory.
        candidates = tuple(Candidate((token,), (0,)) for token in tokens[16:])
        self._row = Row(tokens[:7], candidates)
        self._before, self._other = (Row(tokens[at : at + 5], candidates) for at in (3, 11))
        self._own = _own_scores(model, self._row)

    def require(self, scores: Scores) -> None:
        """Make sure that packs give what the model does.

        Args:
            scores: Of the wrapped model, clean.

        Raises:
            ModelError: They do not.
        """
        try:
            beside, other = (
                _centred(scores([row, self._row])[-len(self._row.candidates) :]) for row in (self._before, self._other)
            )
        except (ModelError, MemoryError, torch.cuda.OutOfMemoryError):
            # Says itself what is wrong, and nothing of how the model reads.
            raise
        except Exception as error:  # Whatever a foreign model raises on tokens that lie otherwise than it is used to.
            raise self.refusal(f"it fails on a pack of rows, {type(error).__name__}: {reason(error)}") from error
        if _distance(beside, other) > (_APART if self._exact else _APART_IN_16_BITS):
            raise self.refusal("what it says of a row depends on the row before it in a pack")
        if self._own is not None and _distance(beside, self._own) > (_OWN if self._exact else _OWN_IN_16_BITS):
            raise self.refusal("its scores in a pack are not those of its own forward")

    def refusal(self, why: str) -> ModelError:
        """What says why the model cannot read packs, and what to do."""
        return ModelError(
            f"{self._name} cannot be tuned on PyTorch: {why}. Its tokens meet otherwise than by attention through "
            "transformers' interface, as in Mamba, Falcon or BLOOM. Set runtime.type = 'vllm', if vLLM knows the "
            "model, or use another one."
        )


@torch.inference_mode()
def _own_scores(model: PreTrainedModel, row: Row) -> np.ndarray | None:
    """The model's own scores of a row's candidates; None if it wants more than tokens."""
    try:
        with _soft_capped(model):
            logits = model(input_ids=torch.tensor([row.prompt], device=model.device), use_cache=False).logits[0, -1]
    except Exception:  # As above.
        return None
    return _centred(logits[[candidate.tokens[0] for candidate in row.candidates]].float().cpu().numpy())


@contextmanager
def _soft_capped(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a soft cap counts: PyTorch's attention, which transformers takes by default, leaves it out."""
    before = model.config._attn_implementation
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is None or before == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _centred(scores: np.ndarray) -> np.ndarray:
    return np.asarray(scores - scores.mean())


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over one plus the size of what is expected; 0 where neither is finite."""
    both = np.isfinite(found) & np.isfinite(expected)
    return float(np.max(np.abs(found - expected)[both] / (1 + np.abs(expected[both])), initial=0.0))
