"""What happens between two steps: records, evaluations, checkpoints. None of it changes what the steps do."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from zotune import checkpoint, stopping
from zotune.errors import DivergedError, StopRun
from zotune.figures import counted
from zotune.journal import Entry, Journal
from zotune.reporters import Reporter
from zotune.run import RunDirectory
from zotune.session import Session
from zotune.signals import Signals


class Upkeep:
    """Keeps a run's directory and its reporter up to date.

    Attributes:
        evaluations: Those on record on the present validation rows, by finished steps.
    """

    def __init__(
        self, session: Session, run: RunDirectory, journal: Journal, reporter: Reporter, signals: Signals
    ) -> None:
        self._session, self._run, self._journal, self._reporter = session, run, journal, reporter
        self._signals, self._train = signals, session.config.train
        # After a power cut the metrics may be ahead of the journal; what is to come does not count yet.
        self.evaluations = run.evaluations(upto=len(journal.entries), rows=session.validation_rows)
        self._evaluated_at = time.monotonic()
        done = len(journal.entries)
        self._saved = done if checkpoint.sound(run.checkpoints, done, journal.identity) else None
        known = run.recorded_steps()
        for entry in journal.entries:
            if entry.step + 1 not in known:
                # The process was killed after the journal had the step; how long it took is lost.
                run.add_metrics(self._step_record(entry, None))

    def record(self, entry: Entry, seconds: float) -> None:
        """Put a finished step on record and tell of it.

        Raises:
            DivergedError: It was one too many without an estimate.
        """
        self._reporter.step(self._run.add_metrics(self._step_record(entry, seconds)))
        if stopping.is_stuck(self._journal.entries, self._train.max_skipped):
            self._reporter.notice(
                f"no direction has changed the loss in {counted(self._train.max_skipped, 'step')}, up to step "
                f"{entry.step + 1}: method.eps is below what the model's dtype resolves, or a method.lr too high has "
                "destroyed the model"
            )
        self._stop_if_diverged()

    def _step_record(self, entry: Entry, seconds: float | None) -> dict[str, Any]:
        skipped = not entry.coefficients
        return {
            "kind": "step",
            "step": entry.step + 1,
            "loss": None if skipped else self._session.optimizer.loss(entry.losses),
            "lr": entry.lr,
            "coefficients": list(entry.coefficients),
            "seconds": None if seconds is None else round(seconds, 4),
            "rows_per_s": None if seconds is None else round(self._session.order.batch_size / seconds, 2),
            "skipped": skipped,
        }

    def between_steps(self) -> None:
        """Evaluate and save what is due after the steps so far, also what a killed process did not come to.

        Raises:
            StopRun: The validation loss has stalled.
        """
        train, done = self._train, len(self._journal.entries)
        for text in self._session.news():
            self._reporter.notice(text)
        # Without any, as on other validation rows than before, there would be nothing to compare the next one with.
        if not self.evaluations or done % train.eval_every == 0 or self._minutes_are_over():
            self.evaluate()
        best = done in self.evaluations and stopping.best(self.evaluations) == done > 0
        if best or (done > 0 and done % train.checkpoint_every == 0):
            self.save()
        if done in self.evaluations:
            stopping.stop_if_stalled(self.evaluations, train.patience, train.min_delta)
        self._signals.heed()

    def finish(self) -> None:
        """Evaluate and save after the last step; whoever wants the run to stop gets what they want."""
        with suppress(StopRun):
            self.evaluate()
        self.save()

    def evaluate(self) -> None:
        """Evaluate after the steps so far, unless that is on record."""
        done = len(self._journal.entries)
        if done in self.evaluations:
            return
        began = time.monotonic()
        with self._signals.idle():
            found = self._session.evaluate()
        self.evaluations[done] = found.metrics
        self._evaluated_at = time.monotonic()
        took = {"seconds": round(self._evaluated_at - began, 3)}
        rows = {"rows": self._session.validation_rows}
        if found.predicted:
            self._run.add_predictions(done, found, **rows)
        record = self._run.add_metrics({"kind": "eval", "step": done, **asdict(found.metrics), **took, **rows})
        self._reporter.evaluation(record)

    def save(self) -> None:
        """Save the state after the steps so far, unless that is done."""
        done, train = len(self._journal.entries), self._train
        if done == self._saved:
            return
        # The journal must never be behind a checkpoint, or the steps in between would be lost.
        self._journal.sync()
        checkpoint.save(
            self._run.checkpoints,
            self._session.runtime.state(),
            step=done,
            window=self._session.optimizer.ask(done).window,
            keep=train.keep_checkpoints,
            best=stopping.best(self.evaluations),
            journal=self._journal.identity(done),
        )
        self._saved = done

    def _minutes_are_over(self) -> bool:
        minutes = self._train.eval_minutes
        return minutes is not None and time.monotonic() - self._evaluated_at >= 60 * minutes

    def _stop_if_diverged(self) -> None:
        allowed = self._train.max_skipped
        entries = self._journal.entries
        if not stopping.has_diverged(entries, allowed):
            return
        if all(map(math.isfinite, entries[-1].losses)):
            raise DivergedError(
                f"{counted(allowed, 'step')} in a row had no estimate, up to step {len(entries)}: the losses of their "
                "probes are all the same, or too far apart. Set another method.eps, or model.dtype = 'float32'."
            )
        raise DivergedError(
            f"the loss was not finite in {counted(allowed, 'step')} in a row, up to step {len(entries)}. "
            "Lower method.lr or method.eps, or set model.dtype = 'float32'."
        )


def of_other_rows(session: Session, run: RunDirectory, done: int) -> list[str]:
    """What to tell if the run was last evaluated on other validation rows."""
    before, now = run.evaluated_rows(done), session.validation_rows
    if before is None or before[0] == now:
        return []
    return [
        f"the validation rows have changed: {len(session.data.validation)} with the checksum {now}, but the last "
        f"evaluation was of {before[1]} with {before[0]}; evaluations of other rows than the present ones do not count"
    ]
