"""The runtime protocol: what executes where the weights are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from torch import Tensor

from zotune.layout import Layout
from zotune.protocol import Probe, Update
from zotune.rows import Row


class Runtime(Protocol):
    """Owns a model, its directions and its accumulated update; speaks in keys and scalars.

    Attributes:
        layout: The sites it tunes.
        fingerprint: Hexadecimal SHA-256 of the base weights, so that a journal is never replayed onto another model.
    """

    layout: Layout
    fingerprint: str

    def score(self, probes: Sequence[Probe], rows: Sequence[Row], *, normalised: bool = True) -> np.ndarray:
        """Log-likelihood of every candidate of every row under every probe.

        Args:
            probes: All from the current window.
            rows: Any number; the runtime cuts them by tokens to fit its memory.
            normalised: Whether the vocabulary's normaliser is needed. When false, scores may miss a constant per row
                and probe, which lets rows of single-token candidates skip most of the output head.

        Returns:
            float32 array ``(len(probes), total candidates)``, candidates in the order of the rows; each is the sum of
            the log-probabilities of the candidate's scored tokens.
        """
        ...

    def generate(
        self, prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[tuple[int, ...]]:
        """Write on from prompts with the clean model as it is now, always taking the likeliest token.

        Args:
            prompts: Token ids, at least one each; any number of prompts, the runtime cuts them to fit its memory.
            max_new_tokens: Most tokens to write, at least 1. A row also ends where the model's context does.
            stop: Token ids that end a row.

        Returns:
            What follows each prompt, in order: at least one token, the last of which may be of ``stop``.
        """
        ...

    def apply(self, update: Update) -> None:
        """Change the weights in factor space; at the end of a window fold and start the next one."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that `apply` has changed, as CPU tensors, bit for bit."""
        ...

    def load_state(self, state: Mapping[str, Tensor], window: int) -> None:
        """Restore what `state` returned while ``window`` was the current window."""
        ...

    def export(self, path: Path) -> None:
        """Write the tuned model as an ordinary Hugging Face folder."""
        ...

    def close(self) -> None:
        """Let go of the model and of what runs it; once that is done, do nothing."""
        ...


class Foresees(Protocol):
    """What a runtime may have besides, that can get ready for a call of `Runtime.score` while its device works."""

    def expect(self, probes: Sequence[Probe], rows: Sequence[Row], *, normalised: bool = True) -> None:
        """Take what the call of `Runtime.score` after the next is likely to be asked; nothing depends on it.

        Args:
            probes: Perhaps of a window that the current one is followed by.
            rows: See `Runtime.score`.
            normalised: See there.
        """
        ...


def foreseeing(runtime: object) -> Foresees | None:
    """The runtime, if it can get ready for what it will be asked."""
    return cast("Foresees", runtime) if hasattr(runtime, "expect") else None
