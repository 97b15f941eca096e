"""What zotune is measured against: the peers' own procedures, written from their descriptions.

* `zotune.testing.baselines.official`: a step of MeZO and of LOZO as their released trainers take it.
"""

from zotune.testing.baselines.official import OfficialLozo, OfficialMezo

__all__ = ["OfficialLozo", "OfficialMezo"]
