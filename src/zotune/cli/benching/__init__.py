"""``zotune bench``: one file per command. Importing a file adds its command."""

# In the order in which --help lists them.
from zotune.cli.benching import step, runtimes, convergence  # isort: skip

__all__ = ["convergence", "runtimes", "step"]
