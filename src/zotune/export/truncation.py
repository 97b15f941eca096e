"""Low-rank truncation within an error that the user allows."""

from __future__ import annotations

import math

from zotune.errors import ConfigError
from zotune.export.changes import Spectrum
from zotune.layout import Site


class Truncation:
    """Cuts the changes of a model's sites to a rank, and keeps account of what that loses.

    Args:
        limit: The largest rank.
        max_error: The largest relative error (Frobenius norm, of one site) that is let pass.
        full: Whether changes are expected to have full rank, which the message then explains.

    Attributes:
        rank: The largest rank that a site has come to; at least 1.
        worst: The site with the largest relative error so far, and that error; None while all are exact.
    """

    def __init__(self, limit: int, max_error: float, *, full: bool = False) -> None:
        self.limit, self.max_error, self._full = limit, max_error, full
        self.rank = 1
        self.worst: tuple[str, float] | None = None
        self._lost = self._whole = 0.0

    @property
    def error(self) -> float:
        """Frobenius norm of all that was lost, relative to that of all changes."""
        return self._lost / self._whole if self._lost else 0.0

    def cut(self, site: Site, spectrum: Spectrum) -> Spectrum:
        """The nearest matrix of at most the largest rank.

        Raises:
            ConfigError: It is further away than the user allows.
        """
        rank = min(spectrum.rank, self.limit)
        lost = spectrum.error(rank)
        self._lost, self._whole = math.hypot(self._lost, lost), math.hypot(self._whole, spectrum.norm)
        self.rank = max(self.rank, rank)
        if lost > self.max_error * spectrum.norm:
            raise ConfigError(self._refusal(site, spectrum, lost / spectrum.norm))
        if lost and (self.worst is None or lost / spectrum.norm > self.worst[1]):
            self.worst = site.name, lost / spectrum.norm
        return spectrum.cut(rank)

    def _refusal(self, site: Site, spectrum: Spectrum, error: float) -> str:
        why = " This method, or its weight decay, changes every weight by itself." if self._full else ""
        return (
            f"rank {self.limit} leaves out {error:.2%} of the change of {site.name} (relative Frobenius error), but "
            f"at most {self.max_error:.2%} is allowed; rank {spectrum.sufficient(self.max_error)} would do there.{why} "
            "Raise --rank or --max-error, or export with --format merged."
        )
