"""What presets are compared with, trained on the rows of a run, in its order, and judged by its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from zotune import models
from zotune.bench import work
from zotune.bench.curve import Evaluated, Spent
from zotune.config import Config
from zotune.data import BatchOrder, Dataset
from zotune.data import load as load_data
from zotune.evaluate import Metrics, evaluate
from zotune.optimizer import Method
from zotune.presets import PRESETS, resolve
from zotune.rows import Example
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.testing.baselines.first_order import FirstOrder
from zotune.testing.baselines.official import OfficialLozo, OfficialMezo


class Stepping(Protocol):
    """A procedure with its model."""

    def step(self, examples: Sequence[Example]) -> float:
        """Learn from a batch; gives a loss."""
        ...


@dataclass(frozen=True)
class Procedure:
    """How a peer trains, or backpropagation.

    Attributes:
        preset: The preset that tunes the same parameters and whose defaults it has.
        lr: Its own default learning rate.
        settings: Keys of the table ``[method]`` that mean something to it.
        begin: Takes a run's configuration, its model, which the steps then change in place, and its data.
        spent: What a step on a batch computes.
    """

    preset: str
    lr: float
    settings: frozenset[str]
    begin: Callable[[Config, Any, Dataset], Stepping]
    spent: Callable[[Sequence[Example]], Spent]


def _lozo(config: Config, model: Any, data: Dataset) -> Stepping:
    method = resolve(config.method)
    return OfficialLozo(
        model,
        lr=method.lr,
        eps=method.eps,
        rank=method.rank,
        interval=method.interval,
        weight_decay=method.weight_decay,
        seed=config.train.seed,
    )


def _mezo(config: Config, model: Any, data: Dataset) -> Stepping:
    method = resolve(config.method)
    return OfficialMezo(model, lr=method.lr, eps=method.eps, weight_decay=method.weight_decay, seed=config.train.seed)


def _adamw(config: Config, model: Any, data: Dataset) -> Stepping:
    method, train = resolve(config.method), config.train
    return FirstOrder(
        model,
        data.objective,
        lr=method.lr,
        steps=train.steps,
        weight_decay=method.weight_decay,
        lora_rank=method.lora_rank,
        lora_alpha=method.lora_alpha,
        seed=train.seed,
    )


def _padded(batch: Sequence[Example]) -> Spent:
    """Two forwards over a padded sequence per candidate."""
    return Spent(2 * sum(len(example.row.candidates) for example in batch), work.padded_tokens(batch))


def _backward(batch: Sequence[Example]) -> Spent:
    """One forward over a padded sequence per candidate, and a backward that computes about twice as much."""
    lengths = work.sequence_lengths(batch)
    return Spent(3 * len(lengths), 3 * len(lengths) * max(lengths))


_DECAYED = frozenset({"lr", "weight_decay"})
_DENSE = _DECAYED | {"eps"}

PROCEDURES = {
    "official-lozo": Procedure("lozo", PRESETS["lozo"].method.lr, _DENSE | {"rank", "interval"}, _lozo, _padded),
    "official-mezo": Procedure("mezo", PRESETS["mezo"].method.lr, _DENSE, _mezo, _padded),
    # Usual values; with LoRA, those of Hu et al. 2022.
    "adamw": Procedure("mezo", 1e-5, _DECAYED, _adamw, _backward),
    "adamw-lora": Procedure("mezo-lora", 2e-4, _DECAYED, _adamw, _backward),
}
"""By the names that ``zotune bench convergence`` takes."""


def train(procedure: Procedure, config: Config) -> Iterator[Evaluated]:
    """Train as a run of this configuration would: the same rows, batches and evaluations.

    Args:
        procedure: Whose steps to take.
        config: A run's; of its method only ``procedure.settings`` count.

    Yields:
        An evaluation before the first step, every ``train.eval_every`` steps and after the last.

    Raises:
        ZotuneError: Model or data are not there or do not fit.
    """
    model, data = load(config)
    steps, every = config.train.steps, config.train.eval_every
    order = BatchOrder(len(data.train), config.train.batch_size, config.train.seed)
    stepping = procedure.begin(config, model, data)
    seconds = 0.0
    for step in range(steps):
        if step % every == 0:
            yield Evaluated(step, judge(model, data), seconds)
        batch = [data.train[index] for index in order.indices(step)]
        began = work.clock(model.device)
        stepping.step(batch)
        seconds += work.clock(model.device) - began
    yield Evaluated(steps, judge(model, data), seconds)


def load(config: Config, *, mapped: bool = False) -> tuple[Any, Dataset]:
    """The model and the data of a run, without the run; see `zotune.models.load`."""
    model, tokenizer = models.load(config.model, mapped=mapped)
    return model, load_data(config.data, tokenizer, models.context_length(model))


def judge(model: Any, data: Dataset) -> Metrics:
    """What a run's evaluation says of a model, which has its own forward again afterwards."""
    with closing(EmbeddedRuntime(model, Method(scope="linear"))) as runtime:
        return evaluate(runtime, data.validation, data.objective).metrics
