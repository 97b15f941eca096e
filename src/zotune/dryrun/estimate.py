"""Estimates of the memory and the time that a run needs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from zotune import learning_rate
from zotune.config import AUTO, RuntimeConfig
from zotune.layout import Layout
from zotune.optimizer import Method
from zotune.peak import forget_peak, peak_bytes
from zotune.protocol import CLEAN, Probe
from zotune.rows import Example
from zotune.runtimes.packing import ACTIVATIONS
from zotune.session import Session


@dataclass(frozen=True)
class Memory:
    """Bytes, estimated but for the last one.

    Attributes:
        weights: Parameters and buffers of the model as loaded.
        factors: float32 U, V and B of every site and what each probe shows of them (dense directions: the largest site
            twice), the momentum of B, and with ``fold = "master"`` the float32 copy of the tuned weights on the host.
        activations: Of the largest forward: 16 vectors of the hidden width per token, and float32 logits of the scored
            tokens twice.
        measured: Peak of this process, or of the GPU's allocator, while a step's probes were scored.
    """

    weights: int
    factors: int
    activations: int
    measured: int

    @property
    def total(self) -> int:
        """What is estimated, together."""
        return self.weights + self.factors + self.activations


@dataclass(frozen=True)
class Time:
    """Seconds.

    Attributes:
        step: Of scoring the first step's probes, measured on the second try; the update comes on top.
        evaluation: Of one evaluation by likelihood, in proportion to the tokens of validation rows that were scored.
        choosing: Of the probes that choose the learning rate, in proportion to a step's; 0 where it is given.
        total: All together.
    """

    step: float
    evaluation: float
    choosing: float
    total: float


def measure(session: Session) -> tuple[Memory, Time]:
    """Score the first step's probes and as many validation rows, each twice; nothing is applied."""
    model = session.runtime.model  # type: ignore[attr-defined]
    examples, _ = session.batch(0)
    proposal = session.optimizer.ask(0)
    forget_peak(model.device)
    step = _score(session, proposal.probes, examples)
    measured = peak_bytes(model.device)
    return _memory(session, len(proposal.probes), measured), _time(session, proposal.probes, step)


def _score(session: Session, probes: Sequence[Probe], examples: Sequence[Example]) -> float:
    """Seconds that it takes, on the second try."""
    rows = [example.row for example in examples]
    for _ in range(2):
        began = time.perf_counter()
        session.runtime.score(probes, rows, normalised=session.data.objective.normalised)
        took = time.perf_counter() - began
    return took


def _time(session: Session, probes: Sequence[Probe], step: float) -> Time:
    train, validation = session.config.train, session.data.validation
    # Of these no direction is drawn and no layer is shared, so a step's time says little of theirs.
    some = validation[: len(probes) * session.order.batch_size]
    evaluation = _score(session, [CLEAN], some) * _tokens(validation) / _tokens(some)
    evaluations = 1 + -(-train.steps // train.eval_every)
    choosing = 0.0
    if session.config.method.lr == AUTO:
        asked = learning_rate.probing(session.optimizer.method).ask(0).probes
        choosing = learning_rate.STEPS * step * len(asked) / len(probes)
    return Time(step, evaluation, choosing, train.steps * step + evaluations * evaluation + choosing)


def _memory(session: Session, probes: int, measured: int) -> Memory:
    model = session.runtime.model  # type: ignore[attr-defined]
    text = model.config.get_text_config()
    stored = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    # What is stored beside weights as well.
    held = {storage.data_ptr(): storage.nbytes() for storage in stored}
    longest = sorted(session.data.train, key=lambda example: example.row.n_tokens)[-session.order.batch_size :]
    runtime = session.config.runtime
    tokens = min(probes * _tokens(longest), max(runtime.max_tokens, longest[-1].row.n_tokens))
    share = tokens / (probes * _tokens(longest))
    logits = probes * sum(len(c.scored) for example in longest for c in example.row.candidates) * text.vocab_size
    activations = ACTIVATIONS * tokens * text.hidden_size * model.dtype.itemsize
    if session.data.objective.normalised:
        activations += int(share * 2 * 4 * logits)
    factors = _factors(session.runtime.layout, session.optimizer.method, runtime, probes)
    return Memory(sum(held.values()), factors, activations, measured)


def _factors(layout: Layout, method: Method, runtime: RuntimeConfig, probes: int) -> int:
    """Bytes of directions, updates and copies."""
    copies = method.directions + 1 + (method.momentum > 0)
    vectors = copies * sum(site.size for site in layout.sites if not site.is_matrix)
    matrices = [site.shape for site in layout.sites if site.is_matrix]
    if method.family == "low-rank":
        # Of every direction its draw and the stage's; of every probe its shift and what it shows, twice as many.
        shown = method.directions + 3 * probes
        numbers = method.rank * sum((copies + shown) * out + 3 * width for out, width in matrices)
        vectors += shown * sum(site.size for site in layout.sites if not site.is_matrix)
    else:
        numbers = 2 * max((out * width for out, width in matrices), default=0)
    return 4 * (numbers + vectors + (layout.size if runtime.fold == "master" else 0))


def _tokens(examples: Sequence[Example]) -> int:
    return sum(example.row.n_tokens for example in examples)
