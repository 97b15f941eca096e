"""``zotune bench``: one file per command. Importing a file adds its command."""

# In the order in which --help lists them.
from zotune.cli.benching import step, runtimes, scaling, overhead, parity, cluster, report  # isort: skip

__all__ = ["cluster", "overhead", "parity", "report", "runtimes", "scaling", "step"]
