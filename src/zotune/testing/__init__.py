"""What a runtime, a preset or a fork is tested with: a dense oracle, tiny models and the suites every runtime passes.

* `zotune.testing.oracle`: MeZO and LOZO by the book in float32, on an unmodified model.
* `zotune.testing.baselines`: the peers' own procedures, reseeded streams and padding included.
* `zotune.testing.reference`: the oracle as a runtime.
* `zotune.testing.tiny`: tiny random models of every family, and rows.
* `zotune.testing.conformance`: what every runtime must do.
* `zotune.testing.battery`: what every preset must do.
"""

from zotune.testing.baselines import OfficialLozo, OfficialMezo
from zotune.testing.oracle import DenseOracle
from zotune.testing.reference import OracleRuntime

__all__ = ["DenseOracle", "OfficialLozo", "OfficialMezo", "OracleRuntime"]
