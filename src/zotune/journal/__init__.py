"""The journal of a run, and all that follows from it: replay, rollback, branches, audits.

records.py    the form of a line, reading, damage
writer.py     appending, as the only one who does
settings.py   what may change from one step on
replay.py     the weights of any step
branches.py   going back, and keeping what came later
audit.py      is it sound, and where do two part
"""

from zotune.journal.records import Change, Entry, Header, read
from zotune.journal.writer import Journal, locked

__all__ = ["Change", "Entry", "Header", "Journal", "locked", "read"]
