"""Training: the one place where optimizer, objective, data, runtime and journal meet."""

from __future__ import annotations

import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from zotune import checkpoint, models
from zotune.config import Config
from zotune.data import BatchOrder, Dataset
from zotune.data import load as load_data
from zotune.errors import ConfigError, DivergedError, JournalError, NonFiniteLossError
from zotune.evaluate import Metrics, evaluate
from zotune.journal import Entry, Header, Journal
from zotune.optimizer import Optimizer
from zotune.presets import resolve
from zotune.progress import Reporter, TerminalReporter
from zotune.rows import Example
from zotune.run import RunDirectory, resolved
from zotune.runtimes.base import Runtime
from zotune.runtimes.embedded import EmbeddedRuntime


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        path: The run directory.
        steps: Finished steps.
        first: Evaluation before training.
        last: Evaluation after the last step.
        seconds: Time spent on steps by this call, evaluations and loading left out.
        skipped: Steps without an estimate, in the whole run.
    """

    path: Path
    steps: int
    first: Metrics
    last: Metrics
    seconds: float
    skipped: int


@dataclass(frozen=True)
class Session:
    """The five parts of a run, and what it was configured to do."""

    config: Config
    optimizer: Optimizer
    runtime: Runtime
    data: Dataset
    order: BatchOrder

    @classmethod
    def build(cls, config: Config) -> Session:
        """Load model and data; nothing is written.

        Raises:
            ZotuneError: The configuration names something that is not there or does not fit.
        """
        import torch

        if config.runtime.threads is not None:
            torch.set_num_threads(config.runtime.threads)
        method = resolve(config.method)
        model, tokenizer = models.load(config.model)
        data = load_data(config.data, tokenizer, models.context_length(model))
        seed, runtime = config.train.seed, config.runtime
        return cls(
            config,
            Optimizer(method, config.train.steps),
            EmbeddedRuntime(model, method, seed=seed, fold=runtime.fold, max_tokens=runtime.max_tokens),
            data,
            BatchOrder(len(data.train), config.train.batch_size, seed),
        )

    def header(self) -> Header:
        """What the journal must say of this session."""
        return Header(
            seed=self.config.train.seed,
            method=asdict(self.optimizer.method),
            steps=self.optimizer.steps,
            batch_size=self.order.batch_size,
            model=self.runtime.fingerprint,
            layout=self.runtime.layout.fingerprint,
            data=f"{zlib.crc32(repr(self.data.train).encode()):08x}",
            fold=self.config.runtime.fold,
        )

    def batch(self, step: int) -> tuple[list[Example], int]:
        """The examples of a step, and the checksum of their indices."""
        indices = self.order.indices(step)
        return [self.data.train[i] for i in indices], zlib.crc32(np.array(indices, dtype="<i8").tobytes())

    def step(self, step: int, journal: Journal) -> Entry:
        """One step: score the probes, journal what follows from their losses, then apply it."""
        examples, checksum = self.batch(step)
        proposal = self.optimizer.ask(step)
        objective = self.data.objective
        scores = self.runtime.score(
            proposal.probes, [example.row for example in examples], normalised=objective.normalised
        )
        losses = objective.losses(scores, examples).mean(axis=1, dtype=np.float64).tolist()
        try:
            update = self.optimizer.tell(proposal, losses)
        except NonFiniteLossError:
            update = self.optimizer.skip(proposal)
        entry = Entry(step, tuple(losses), tuple(c for _, c in update.terms), update.lr, checksum)
        journal.append(entry)
        self.runtime.apply(update)
        return entry

    def replay(self, journal: Journal, start: int) -> None:
        """Apply the journal's updates from step ``start`` on, without a forward pass."""
        for entry in journal.entries[start:]:
            if entry.batch != self.batch(entry.step)[1]:
                raise JournalError(f"{journal.path}: step {entry.step} used other examples than this data gives")
            self.runtime.apply(self.optimizer.update(entry.step, entry.coefficients))


def start(config: Config, reporter: Reporter | None = None) -> Summary:
    """Train from the beginning in a new run directory.

    Args:
        config: What to do.
        reporter: Who is told; without one, progress is printed.

    Raises:
        RunExistsError: The directory is there; nothing in it is touched.
        DivergedError: Too many steps in a row had a non-finite loss.
        ZotuneError: The configuration names something that is not there or does not fit.
    """
    RunDirectory(Path(config.output)).refuse_existing()
    config = resolved(config)
    session = Session.build(config)
    run = RunDirectory.create(config)
    journal = Journal.create(run.journal, session.header())
    return _train(session, run, journal, reporter or TerminalReporter(Console()))


def resume(path: Path, reporter: Reporter | None = None, steps: int | None = None) -> Summary:
    """Go on with a run from its newest checkpoint and its journal, to the same bits as if it had never stopped.

    Args:
        path: The run directory.
        reporter: Who is told; without one, progress is printed.
        steps: New total number of steps; only where the schedule is constant, since another length would change it.

    Raises:
        JournalError: The path is no run, its journal is damaged, or model or data are not those it began with.
        ConfigError: ``steps`` cannot be changed.
    """
    run, config = RunDirectory.open(path)
    if steps is not None and steps != config.train.steps:
        if resolve(config.method).schedule != "constant":
            raise ConfigError(
                "--steps needs a constant schedule: another length changes the learning rate of every step"
            )
        config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
    session, journal = restore(run, config)
    if len(journal.entries) > config.train.steps:
        raise ConfigError(f"{path} has {len(journal.entries)} steps already, more than {config.train.steps}")
    journal.claim()
    run.reopen(config)
    reporter = reporter or TerminalReporter(Console())
    if journal.dropped:
        reporter.notice("the last record of the journal was torn and has been dropped; its step runs again")
    return _train(session, run, journal, reporter)


def restore(run: RunDirectory, config: Config) -> tuple[Session, Journal]:
    """A session as it was after the last step of the run's journal.

    Raises:
        JournalError: See `resume`.
    """
    session, journal = Session.build(config), Journal.open(run.journal)
    journal.require(session.header())
    saved = checkpoint.newest(run.checkpoints)
    done = 0
    if saved is not None and saved[0] <= len(journal.entries):
        done, window, state = saved
        session.runtime.load_state(state, window)
    session.replay(journal, done)
    return session, journal


def evaluate_run(path: Path) -> Metrics:
    """Evaluate a run's weights, after its last step, on its validation rows; errors as for `resume`."""
    session, _ = restore(*RunDirectory.open(path))
    return evaluate(session.runtime, session.data.validation, session.data.objective)


def _train(session: Session, run: RunDirectory, journal: Journal, reporter: Reporter) -> Summary:
    """Run the steps that the journal does not have yet, with evaluations and checkpoints in between."""
    train, seconds = session.config.train, 0.0
    reporter.start(run.path, train.steps, len(journal.entries))
    try:
        for notice in session.data.notices:
            reporter.notice(notice)
        _evaluate(session, run, len(journal.entries), reporter)
        for step in range(len(journal.entries), train.steps):
            began = time.perf_counter()
            entry = session.step(step, journal)
            took = time.perf_counter() - began
            seconds += took
            _record_step(session, run, entry, took, reporter)
            _stop_if_diverged(journal, train.max_skipped)
            done = step + 1
            if done % train.eval_every == 0 or done == train.steps:
                _evaluate(session, run, done, reporter)
            if done % train.checkpoint_every == 0 or done == train.steps:
                _save(session, run, journal)
    finally:
        reporter.finish()
        journal.close()
    known = run.evaluations()
    skipped = sum(not entry.coefficients for entry in journal.entries)
    done = len(journal.entries)
    return Summary(run.path, done, known[min(known)], known[done], seconds, skipped)


def _evaluate(session: Session, run: RunDirectory, done: int, reporter: Reporter) -> None:
    """Evaluate after ``done`` steps, unless that is on record."""
    if done in run.evaluations():
        return
    began = time.perf_counter()
    metrics = evaluate(session.runtime, session.data.validation, session.data.objective)
    record = {"kind": "eval", "step": done, **asdict(metrics), "seconds": round(time.perf_counter() - began, 3)}
    reporter.evaluation(run.add_metrics(record))


def _record_step(session: Session, run: RunDirectory, entry: Entry, seconds: float, reporter: Reporter) -> None:
    skipped = not entry.coefficients
    record: dict[str, Any] = {
        "kind": "step",
        "step": entry.step + 1,
        "loss": None if skipped else session.optimizer.loss(entry.losses),
        "lr": entry.lr,
        "coefficients": list(entry.coefficients),
        "seconds": round(seconds, 4),
        "rows_per_s": round(session.order.batch_size / seconds, 2),
        "skipped": skipped,
    }
    reporter.step(run.add_metrics(record))


def _save(session: Session, run: RunDirectory, journal: Journal) -> None:
    # The journal must never be behind a checkpoint, or the steps in between would be lost.
    journal.sync()
    done = len(journal.entries)
    window = session.optimizer.ask(done).window
    keep = session.config.train.keep_checkpoints
    checkpoint.save(run.checkpoints, session.runtime.state(), step=done, window=window, keep=keep)


def _stop_if_diverged(journal: Journal, allowed: int) -> None:
    recent = journal.entries[-allowed:]
    if len(recent) == allowed and not any(entry.coefficients for entry in recent):
        raise DivergedError(
            f"the loss was not finite in {allowed} steps in a row, up to step {recent[-1].step + 1}. "
            "Lower method.lr or method.eps, or set model.dtype = 'float32'."
        )
