"""The recipe of a tuned model: a base model and a journal, from which its weights follow without data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune import checkpoint, models
from zotune.config import ModelConfig
from zotune.errors import JournalError, ModelError
from zotune.export.card import Facts
from zotune.journal import Journal, branches
from zotune.optimizer import Method, Optimizer
from zotune.paths import StrPath, expand
from zotune.protocol import Update
from zotune.runtimes import precision
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.engine import checkpoint_layout
from zotune.runtimes.fingerprint import digest

_DTYPES = ("bfloat16", "float32", "float16")


@dataclass(frozen=True)
class Recipe:
    """All that a run's weights follow from.

    Attributes:
        model: The base model.
        journal: Of the run; at least one step.
        facts: What people should know of the run.
        checkpoints: Folder of states that save replaying from the beginning; None if there is none.
    """

    model: ModelConfig
    journal: Journal
    facts: Facts
    checkpoints: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what would be the base model under another name."""
        if not self.journal.entries:
            raise JournalError(f"{self.journal.path} has no finished step yet, so there is nothing to export")

    @classmethod
    def of_run(cls, path: StrPath) -> Recipe:
        """The recipe that a run directory holds.

        Raises:
            JournalError: The path is no run, its journal is damaged, or it has no finished step.
        """
        run, config = branches.open_run(expand(path))
        journal = Journal.open(run.journal)
        return cls(config.model, journal, Facts.of_run(run, config, journal), run.checkpoints)

    @property
    def method(self) -> Method:
        """The method that the journal names.

        Raises:
            JournalError: This zotune does not know it.
        """
        try:
            return Method(**self.journal.header.method)
        except TypeError as error:
            raise JournalError(f"{self.journal.path} was made by a newer zotune: {error}; update zotune") from error

    def load_base(self) -> tuple[Any, Any]:
        """The base model and its tokenizer, known to be those of the journal by the weights' fingerprint.

        Of a quantised one it is what `zotune.runtimes.engine.checkpoint_layout.load` gives: without quantised weights.
        ``dtype = "auto"`` depends on the machine; the one that the run had is found by trying.

        Raises:
            ModelError: The model cannot be loaded.
            JournalError: It is another model, or has another dtype.
        """
        expected = self.journal.header.model
        if models.is_quantised(self.model):
            model, tokenizer = checkpoint_layout.load(self.model)
            if checkpoint_layout.fingerprint(self.model, model) == expected:
                return model, tokenizer
        got = {}
        for dtype in ("auto", *_DTYPES) if self.model.dtype == "auto" else (self.model.dtype,):
            model, tokenizer = models.load(self.model.model_copy(update={"dtype": dtype}))
            got[precision.name(model.dtype)] = found = digest(model.named_parameters())
            if found == expected:
                return model, tokenizer
        raise JournalError(
            f"{self.model.path} is not the base model of this journal: its weights have the fingerprint "
            f"{', '.join(f'{found[:16]} in {dtype}' for dtype, found in got.items())}, but the journal expects "
            f"{expected[:16]}. Give the model that the run began with ({self.facts.base})."
        )

    def require_plain(self, model: Any) -> None:
        """Refuse a base model whose weights cannot be written to, with a `ModelError`."""
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ModelError(
                f"{self.model.path} is quantised, so what was learnt cannot be written into its weights. What was "
                "learnt in scope 'linear' without weight decay can be exported as an adapter (--format peft)."
            )

    def begin(self, model: Any) -> EmbeddedRuntime:
        """A runtime on the base model, before the first step.

        Raises:
            JournalError: The model's sites are not those of the journal.
            ModelError: It is quantised.
        """
        header = self.journal.header
        self.require_plain(model)
        runtime = EmbeddedRuntime(model, self.method, seed=header.seed, fold=header.fold)
        if (found := runtime.layout.fingerprint) != header.layout:
            raise JournalError(
                f"the sites of {self.model.path} are not those of the journal: fingerprint {found[:16]}, expected "
                f"{header.layout[:16]}. Use the versions of zotune and transformers that made it."
            )
        return runtime

    def runtime(self, model: Any) -> EmbeddedRuntime:
        """A runtime on the base model, as it was after the last step; errors as for `begin`."""
        runtime, done, journal = self.begin(model), 0, self.journal
        if self.checkpoints and (
            saved := checkpoint.newest(self.checkpoints, upto=len(journal.entries), identity=journal.identity)
        ):
            done, window, state = saved
            runtime.load_state(state, window)
        for update in self.updates(done):
            runtime.apply(update)
        return runtime

    def updates(self, start: int = 0) -> Iterator[Update]:
        """The journal's updates from step ``start`` on."""
        optimizer = Optimizer(self.method, self.journal.header.steps)
        for entry in self.journal.entries[start:]:
            yield optimizer.update(entry.step, entry.coefficients, entry.lr)
