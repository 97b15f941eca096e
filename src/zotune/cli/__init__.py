"""The command line. A command is a function in one of these modules; importing the module adds it to the program."""

from zotune.cli.program import app, main

# In the order in which --help lists their commands.
from zotune.cli import training, looking, tasking, history, journals, scale, watching, exporting, benching  # isort: skip

__all__ = [
    "app",
    "benching",
    "exporting",
    "history",
    "journals",
    "looking",
    "main",
    "scale",
    "tasking",
    "training",
    "watching",
]
