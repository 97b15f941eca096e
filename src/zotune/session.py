"""A session: the five parts of a run in memory, and how they come back to where its journal ends."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from zotune import checkpoint, models
from zotune.config import Config
from zotune.data import BatchOrder, Dataset
from zotune.data import load as load_data
from zotune.errors import JournalError
from zotune.evaluate import Evaluation, evaluate
from zotune.journal import Header, Journal
from zotune.objectives import Objective, batch_losses, calibrated
from zotune.optimizer import Optimizer
from zotune.paths import expand
from zotune.presets import departures, resolve, too_near
from zotune.protocol import Proposal
from zotune.rows import Example, checksum
from zotune.run import RunDirectory
from zotune.runtimes.base import Runtime, foreseeing
from zotune.runtimes.blueprint import Blueprint
from zotune.runtimes.engine.runtime import EngineRuntime, Work
from zotune.runtimes.replicas.runtime import RayRuntime
from zotune.runtimes.sites import left_out

News = Callable[[], Iterable[str]]
"""What has happened to a runtime since the last call, in a line each."""


@dataclass(frozen=True)
class Session:
    """The five parts of a run, and what it was configured to do."""

    config: Config
    optimizer: Optimizer
    runtime: Runtime
    data: Dataset
    order: BatchOrder
    news: News = tuple

    @classmethod
    def build(cls, config: Config, *, trains: bool = True) -> Session:
        """Load model and data; nothing is written.

        Args:
            config: What to do.
            trains: Whether the session is to take steps. One that only looks at a run leaves the board of the run's
                replicas (`zotune.runtimes.replicas.board`) to who trains there.

        Raises:
            ZotuneError: The configuration names something that is not there or does not fit.
        """
        blueprint = Blueprint(config.model, resolve(config.method), config.train.seed, config.runtime)
        model, tokenizer = blueprint.load()
        data = load_data(config.data, tokenizer, models.context_length(model), models.embeddings(model))
        told = *departures(config.method), *too_near(blueprint.method, 8 * models.dtype_of(config.model).itemsize)
        runtime, news = _start(config, blueprint, model, data, expand(config.output) if trains else None)
        return cls(
            config,
            Optimizer(blueprint.method, config.train.steps),
            runtime,
            replace(data, notices=(*data.notices, *left_out(model, runtime.layout), *told)),
            BatchOrder(len(data.train), config.train.batch_size, config.train.seed),
            news,
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
            data=checksum(self.data.train),
            fold=self.config.runtime.fold,
        )

    def batch(self, step: int) -> tuple[list[Example], int]:
        """The examples of a step, and the checksum of their indices."""
        indices = self.order.indices(step)
        return [self.data.train[i] for i in indices], zlib.crc32(np.array(indices, dtype="<i8").tobytes())

    def losses(self, proposal: Proposal, examples: Sequence[Example]) -> list[float]:
        """The loss of every probe of a proposal on some examples, their mean in double precision."""
        objective = self.objective
        rows = [example.row for example in examples]
        scores = self.runtime.score(proposal.probes, rows, normalised=objective.normalised)
        return batch_losses(objective, scores, examples)

    def expect(self, step: int) -> None:
        """Let a runtime that can get ready for a step know of it, before the step that precedes it is scored."""
        if (runtime := foreseeing(self.runtime)) is not None:
            rows = [example.row for example in self.batch(step)[0]]
            runtime.expect(self.optimizer.ask(step).probes, rows, normalised=self.objective.normalised)

    @cached_property
    def objective(self) -> Objective:
        """What steps lower; evaluation knows the data's own alone."""
        data = self.data
        return calibrated(data.objective, data.train) if self.optimizer.method.calibrated else data.objective

    @cached_property
    def validation_rows(self) -> str:
        """What tells the validation rows from others: evaluations of other rows cannot be compared."""
        return checksum(self.data.validation)

    def evaluate(self) -> Evaluation:
        """Judge the weights as they are now on the validation rows."""
        data = self.data
        return evaluate(self.runtime, data.validation, data.objective, data.decode, data.stop)

    def close(self) -> None:
        """Let go of the model and of what runs it."""
        self.runtime.close()

    def replay(self, journal: Journal, start: int, stop: int | None = None) -> None:
        """Apply the journal's updates of the steps from ``start`` to before ``stop``, without a forward pass."""
        for entry in journal.entries[start:stop]:
            if entry.batch != self.batch(entry.step)[1]:
                raise JournalError(f"{journal.path}: step {entry.step} used other examples than this data gives")
            self.runtime.apply(self.optimizer.update(entry.step, entry.coefficients, entry.lr))


def _start(config: Config, blueprint: Blueprint, model: Any, data: Dataset, run: Path | None) -> tuple[Runtime, News]:
    """The configured runtime, and where it tells what happens to it; ``run`` is the directory that it trains in."""
    options = config.runtime
    if options.inner == "vllm":
        blueprint = replace(blueprint, work=Work.of(data, config.train.batch_size, blueprint.method))
    if options.type == "vllm":
        engine = cast(EngineRuntime, blueprint.build(model))
        return engine, engine.news
    if options.type == "torch":
        return blueprint.build(model), tuple
    runtime = RayRuntime.start(blueprint, run)
    return runtime, runtime.news


def restore(
    run: RunDirectory,
    config: Config,
    step: int | None = None,
    notice: Callable[[str], None] = lambda text: None,
    *,
    trains: bool = True,
) -> tuple[Session, Journal]:
    """A session as it was after ``step`` finished steps of the run, from its newest sound checkpoint and its journal.

    Args:
        run: Where checkpoints and journal are.
        config: What the run was configured to do.
        step: At most the steps of the journal; default: all of them.
        notice: Told which checkpoints are damaged, of another run or of another bank; the journal makes up for them.
        trains: See `Session.build`.

    Raises:
        JournalError: See `zotune.train.resume`.
    """
    # A run that was moved or copied does not say where it lies; its replicas would go by what lies where it began.
    session = Session.build(config.model_copy(update={"output": str(run.path)}), trains=trains)
    try:
        journal = Journal.open(run.journal)
        journal.require(session.header())
        stop = len(journal.entries) if step is None else step
        done = 0
        saved = checkpoint.newest(
            run.checkpoints, upto=stop, identity=journal.identity, notice=notice, bank=config.runtime.bank
        )
        if saved is not None:
            done, window, state = saved
            session.runtime.load_state(state, window)
        session.replay(journal, done, stop)
    except BaseException:
        session.close()
        raise
    return session, journal
