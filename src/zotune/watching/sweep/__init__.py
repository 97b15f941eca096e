"""Sweeps: several runs from one file, each an ordinary run directory, and one table of what they came to."""

from zotune.watching.sweep.plan import Plan, Planned, read
from zotune.watching.sweep.summary import Group, Row, Summary, summarise
from zotune.watching.sweep.work import run

__all__ = ["Group", "Plan", "Planned", "Row", "Summary", "read", "run", "summarise"]
