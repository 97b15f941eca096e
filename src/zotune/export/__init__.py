"""Export: what a run learnt as a merged model, a PEFT adapter or a journal file, and the way back from the last."""

from zotune.export.exporting import FORMATS, Exported, apply_journal, export_run

__all__ = ["FORMATS", "Exported", "apply_journal", "export_run"]
