"""Sweeps: several runs from one file, each an ordinary run directory, and one table of what they came to."""

from zotune.sweep.plan import Plan, Planned, read
from zotune.sweep.summary import Group, Row, Summary, summarise
from zotune.sweep.work import run

__all__ = ["Group", "Plan", "Planned", "Row", "Summary", "read", "run", "summarise"]
