"""A dry run: what a run would learn, tune, need and take, without training anything."""

from zotune.dryrun.report import DryRun, dry_run

__all__ = ["DryRun", "dry_run"]
