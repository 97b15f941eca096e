"""``zotune bench``: one file per command. Importing a file adds its command."""

# In the order in which --help lists them.
from zotune.cli.benching import (  # isort: skip
    step,
    runtimes,
    scaling,
    overhead,
    parity,
    convergence,
    cluster,
    report,
)

__all__ = ["cluster", "convergence", "overhead", "parity", "report", "runtimes", "scaling", "step"]
