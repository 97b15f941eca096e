"""Training: the one place where optimizer, objective, data, runtime and journal meet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from zotune import learning_rate, stopping
from zotune.config import MADE, Config
from zotune.errors import ConfigError, JournalError, NonFiniteLossError, StopRun, required
from zotune.evaluate import Metrics
from zotune.journal import Entry, Journal, read
from zotune.journal.branches import open_run
from zotune.journal.settings import of_length
from zotune.paths import StrPath, expand
from zotune.progress import LastingConsole, TerminalReporter
from zotune.reporters import Reporter, Reporters
from zotune.run import RunDirectory, resolved
from zotune.session import Session, restore
from zotune.signals import Interrupted, Signals
from zotune.upkeep import Upkeep, of_other_rows
from zotune.watching import trackers


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        path: The run directory.
        steps: Finished steps.
        first: Evaluation before training, or the first one on the present validation rows.
        last: Evaluation after the last step.
        seconds: Time spent on steps by this call, evaluations and loading left out.
        skipped: Steps without an estimate, in the whole run.
        best: Step of the lowest validation loss, 0 for the base model; None if no loss is finite. Validation rows that
            the run had before do not count.
        stopped: Why the run ended before its last step; None if it did not.
    """

    path: Path
    steps: int
    first: Metrics
    last: Metrics
    seconds: float
    skipped: int
    best: int | None
    stopped: str | None


def start(config: Config, reporter: Reporter | None = None, callbacks: Sequence[Reporter] = ()) -> Summary:
    """Train from the beginning in a new run directory.

    Ctrl-C and SIGTERM let the step in flight finish and save the run; a second one ends it where it stands.

    Args:
        config: What to do.
        reporter: Who is told; without one, progress is printed.
        callbacks: Told after the reporter, in order. One that raises `zotune.errors.StopRun` from ``step`` or
            ``evaluation`` ends the run early: it is evaluated and saved, and the summary says why.

    Raises:
        RunExistsError: The directory is there; nothing in it is touched.
        DivergedError: Too many steps in a row had a non-finite loss.
        CallbackError: A callback failed; every finished step is in the journal.
        ZotuneError: The configuration names something that is not there or does not fit.
    """
    RunDirectory(required(config, Config, MADE).output).require_free()
    config = resolved(config)
    first = reporter or TerminalReporter(LastingConsole())
    reporter = _together(config, first, callbacks)
    with closing(Session.build(config)) as session:
        notices: list[str] = []
        session = learning_rate.settled(session, first.notice, notices.append)
        run = RunDirectory.create(session.config, session.header())
        journal = Journal.open(run.journal)
        journal.claim()
        return _train(session, run, journal, reporter, notices)


def resume(
    path: StrPath, reporter: Reporter | None = None, steps: int | None = None, callbacks: Sequence[Reporter] = ()
) -> Summary:
    """Go on with a run from its newest checkpoint and its journal, to the same bits as if it had never stopped.

    Args:
        path: The run directory.
        reporter: Who is told; without one, progress is printed.
        steps: New total number of steps; only where the schedule is constant, since another length would change it.
        callbacks: As for `start`.

    Raises:
        JournalError: The path is no run, its journal is damaged, model or data are not those it began with, or another
            process is training there.
        ConfigError: ``steps`` is no number of steps, or cannot be changed.
    """
    run, config = open_run(expand(path))
    if steps is not None:
        config = of_length(config, steps, run.journal)
    notices: list[str] = []
    reporter = _together(config, reporter or TerminalReporter(LastingConsole()), callbacks)
    session, journal = restore(run, config, notice=notices.append)
    with closing(session):
        if len(journal.entries) > config.train.steps:
            raise ConfigError(f"{path} has {len(journal.entries)} steps already, more than {config.train.steps}")
        journal.claim()
        run.reopen(config)
        if journal.dropped:
            notices.append("the last record of the journal was torn and has been dropped; its step runs again")
        notices += of_other_rows(session, run, len(journal.entries))
        return _train(session, run, journal, reporter, notices)


def evaluate_run(path: StrPath, best: bool = False) -> Metrics:
    """Evaluate a run's weights on its validation rows.

    Args:
        path: The run directory.
        best: Take the weights of the lowest validation loss on record, not those after the last step.

    Raises:
        JournalError: As for `resume`; or ``best``, and no evaluation is on record.
    """
    run, config = open_run(expand(path))
    step = stopping.best(run.evaluations(upto=len(read(run.journal).entries))) if best else None
    if best and step is None:
        raise JournalError(f"{path} has no evaluation with a finite loss on record, so none is the best")
    session, _ = restore(run, config, step, trains=False)
    with closing(session):
        return session.evaluate().metrics


def take_step(session: Session, step: int, journal: Journal) -> Entry:
    """One step: score the probes, journal what follows from their losses, then apply it."""
    examples, checksum = session.batch(step)
    proposal = session.optimizer.ask(step)
    session.expect(step + 1)
    losses = session.losses(proposal, examples)
    try:
        update = session.optimizer.tell(proposal, losses)
    except NonFiniteLossError:
        update = session.optimizer.skip(proposal)
    entry = Entry(step, tuple(losses), tuple(c for _, c in update.terms), update.lr, checksum)
    journal.append(entry)
    session.runtime.apply(update)
    return entry


def _together(config: Config, first: Reporter, callbacks: Sequence[Reporter]) -> Reporter:
    if not isinstance(callbacks, Sequence):
        raise ConfigError(f"callbacks must be a list, not {callbacks!r}")
    return Reporters(first, *trackers.build(config, first.notice), *callbacks)


def _train(
    session: Session, run: RunDirectory, journal: Journal, reporter: Reporter, notices: Sequence[str] = ()
) -> Summary:
    """Take the steps that the journal does not have yet, with evaluations and checkpoints in between."""
    seconds, stopped = 0.0, None
    with ExitStack() as stack:
        stack.callback(journal.close)
        stack.callback(reporter.finish)
        signals = Signals()
        # Trackers begin with what is on record, which a killed process may have left behind the journal.
        upkeep = Upkeep(session, run, journal, reporter, signals)
        reporter.start(run.path, session.config.train.steps, len(journal.entries))
        for notice in (*notices, *session.data.notices):
            reporter.notice(notice)
        stack.enter_context(signals)
        try:
            try:
                upkeep.between_steps()
                for step in range(len(journal.entries), session.config.train.steps):
                    began = time.perf_counter()
                    entry = take_step(session, step, journal)
                    took = time.perf_counter() - began
                    seconds += took
                    upkeep.record(entry, took)
                    upkeep.between_steps()
            except StopRun as reason:
                stopped = str(reason)
                reporter.notice(f"stopped after step {len(journal.entries)}: {stopped}")
            upkeep.finish()
        except Interrupted as interrupted:
            reporter.notice(f"{interrupted} after step {len(journal.entries)}: saving")
            upkeep.save()
            raise interrupted.outcome from None
    evaluations = upkeep.evaluations
    return Summary(
        run.path,
        steps=len(journal.entries),
        first=evaluations[min(evaluations)],
        last=evaluations[len(journal.entries)],
        seconds=seconds,
        skipped=sum(not entry.coefficients for entry in journal.entries),
        best=stopping.best(evaluations),
        stopped=stopped,
    )
