"""Sites and layouts: all that an optimizer may know of a model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Scope = Literal["linear", "all", "last-layers"]
"""What of a model is tuned.

``linear``: the weights of linear layers except the output head; ``all``: every parameter; ``last-layers``: every
parameter of the last two fifths of the decoder's layers, the last and the one below it in turn, a window each.
"""


@dataclass(frozen=True)
class Site:
    """One parameter tensor that is tuned.

    Attributes:
        name: Its canonical Hugging Face name, e.g. ``model.layers.0.self_attn.q_proj.weight``.
        shape: ``(out, in)`` for a matrix, whatever way round the checkpoint stores it; ``(n,)`` for a vector.
            An embedding is ``(vocabulary, width)``.
        decays: Whether weight decay applies: by its name, as in the official code of MeZO and LOZO, it does not to
            biases and to what is called layer norm.
        turn: ``(k, n)``: directions move the site in every n-th window, beginning with window k.
    """

    name: str
    shape: tuple[int, ...]
    decays: bool = True
    turn: tuple[int, int] = (0, 1)

    def moves(self, window: int) -> bool:
        """Whether directions of this window move the site; elsewhere they are zero there."""
        first, every = self.turn
        return window % every == first

    @property
    def is_matrix(self) -> bool:
        """True for linear weights and embeddings, false for biases and norm gains."""
        return len(self.shape) == 2

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def period(sites: Iterable[Site]) -> int:
    """After how many windows the same sites move again."""
    return math.lcm(*(site.turn[1] for site in sites))


@dataclass(frozen=True)
class Layout:
    """The ordered sites of a model."""

    sites: tuple[Site, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of all that sites are, in order; equal fingerprints mean interchangeable journals."""
        always = Site.turn
        text = json.dumps([[s.name, s.shape, s.decays] + ([s.turn] if s.turn != always else []) for s in self.sites])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Number of tuned parameters."""
        return sum(site.size for site in self.sites)
