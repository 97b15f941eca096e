"""What benchmarks of steps share: a model with batches, zotune's whole step on them, and what may be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
import torch

from zotune import data as datasets
from zotune import demo, models
from zotune.bench import work
from zotune.config import DataConfig, ModelConfig
from zotune.errors import ConfigError, DataError, unknown
from zotune.layout import Scope
from zotune.objectives import batch_losses
from zotune.optimizer import Method, Optimizer
from zotune.presets import PRESETS
from zotune.protocol import Probe, Proposal, Update
from zotune.rows import Example, Row
from zotune.runtimes import precision
from zotune.runtimes.base import foreseeing
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.testing.baselines.official import OfficialLozo

_DTYPES = ("bfloat16", "float16", "float32")
_SCOPES = get_args(Scope)


@dataclass(frozen=True)
class Setting:
    """A loaded model and the batches to step on."""

    model: Any
    dataset: datasets.Dataset
    batch_size: int

    def batch(self, number: int) -> list[Example]:
        """The examples of a step."""
        order = datasets.BatchOrder(len(self.dataset.train), self.batch_size, seed=0)
        return [self.dataset.train[index] for index in order.indices(number)]


def resolved(dtype: str) -> str:
    """The dtype that ``auto`` stands for on this machine; any other name as it is."""
    if dtype != "auto":
        return dtype
    return precision.name(precision.product_dtype(torch.bfloat16, models.chosen_device().type))


def method_of(scope: str, rank: int, directions: int) -> Method:
    """The preset ``lozo`` with these values."""
    known = cast("Scope", scope)
    return replace(PRESETS["lozo"].method, scope=known, rank=rank, directions=directions)


def official_of(model: Any, method: Method) -> OfficialLozo:
    """The official procedure with the values of a method; it tunes every parameter, one direction a step."""
    return OfficialLozo(model, lr=method.lr, eps=method.eps, rank=method.rank, interval=method.interval)


def prepare(
    *,
    model: str | None,
    data: str | Path | None,
    dtype: str,
    batch_size: int,
    load: Callable[[ModelConfig], tuple[Any, Any]] = models.load,
) -> Setting:
    """Load a model and its data; what is None comes from the demonstration."""
    assets = demo.fetch() if model is None or data is None else None
    path = model if model is not None else str(assets.model) if assets else ""
    loaded, tokenizer = load(ModelConfig(path=path, dtype=cast("Literal['float32']", dtype)))
    if data is not None:
        folder = Path(data)
        source = DataConfig(
            task="sst2", train=str(split_file(folder, "train")), validation=str(split_file(folder, "validation"))
        )
    else:
        source = demo.config(cast("demo.Assets", assets), Path("unused")).data
    return Setting(loaded, datasets.load(source, tokenizer, models.context_length(loaded)), batch_size)


def split_file(folder: Path, split: str) -> Path:
    """The file with a split's rows.

    Raises:
        DataError: The folder has none.
    """
    for name in (f"{split}.jsonl.gz", f"{split}.jsonl"):
        if (folder / name).is_file():
            return folder / name
    what = f"has no {split}.jsonl.gz or {split}.jsonl" if folder.is_dir() else "is no folder"
    raise DataError(f"{folder} {what}; give a folder with the task's rows")


def check(dtype: str, baseline_dtype: str, scope: str, counts: Sequence[int]) -> None:
    """Refuse unknown names and counts that are not positive, with a `ConfigError`."""
    for name in (dtype, baseline_dtype):
        if name not in _DTYPES:
            raise ConfigError(unknown("dtype", name, (*_DTYPES, "auto")))
    if scope not in _SCOPES:
        raise ConfigError(unknown("scope", scope, _SCOPES))
    if min(counts) < 1:
        raise ConfigError(f"batch size, rank, directions, repeats and threads must be at least 1, got {list(counts)}")


@contextmanager
def threads_set(count: int | None) -> Iterator[None]:
    """So many CPU threads for a while; None: as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rows(batch: Sequence[Example]) -> list[Any]:
    return [example.row for example in batch]


class Timed(Protocol):
    """What a step needs of a runtime, which knows where its time goes."""

    def score(self, probes: Sequence[Probe], rows: Sequence[Row], *, normalised: bool = True) -> np.ndarray:
        """See `zotune.runtimes.base.Runtime.score`."""
        ...

    def apply(self, update: Update) -> None:
        """See `zotune.runtimes.base.Runtime.apply`."""
        ...

    def close(self) -> None:
        """See `zotune.runtimes.base.Runtime.close`."""
        ...

    @property
    def timings(self) -> dict[str, float]:
        """Seconds spent so far, by phase."""
        ...


class Stepper:
    """zotune's side: a whole step, as the training loop does it.

    Args:
        setting: Model and batches.
        method: What to tune and how.
        runtime: Where; default: the embedded runtime.
        device: Of the runtime; default: the model's.

    Attributes:
        window: The current one.
    """

    def __init__(
        self, setting: Setting, method: Method, runtime: Timed | None = None, device: torch.device | None = None
    ) -> None:
        self.setting = setting
        self.device = device or next(setting.model.parameters()).device
        self.objective = setting.dataset.objective
        self.runtime: Timed = runtime or EmbeddedRuntime(setting.model, method)
        self.optimizer = Optimizer(method, steps=method.interval)
        self.window = 0

    def step(self, number: int) -> float:
        """One step on the batch of this number; gives the loss."""
        batch, proposal = self.setting.batch(number), self._ask(number)
        if (runtime := foreseeing(self.runtime)) is not None:
            rows = _rows(self.setting.batch(number + 1))
            runtime.expect(self._ask(number + 1).probes, rows, normalised=self.objective.normalised)
        scores = self.runtime.score(proposal.probes, _rows(batch), normalised=self.objective.normalised)
        losses = batch_losses(self.objective, scores, batch)
        update = self.optimizer.tell(proposal, losses)
        # The fold is timed by itself, so that it does not depend on how many windows the repeats happen to cross.
        self.runtime.apply(replace(update, closes_window=False))
        return self.optimizer.loss(losses)

    def _ask(self, number: int) -> Proposal:
        interval = self.optimizer.method.interval
        return self.optimizer.ask(self.window * interval + number % interval)

    def fold(self) -> None:
        """Close the window."""
        last = (self.window + 1) * self.optimizer.method.interval - 1
        self.runtime.apply(Update(last, self.window, (), 0.0, closes_window=True))
        self.window += 1

    @property
    def timings(self) -> dict[str, float]:
        """Seconds that the runtime spent so far, by phase."""
        return dict(self.runtime.timings)

    def tokens(self, batch: Sequence[Example]) -> int:
        """Tokens that a step on this batch computes, all probes counted."""
        return work.step_tokens(_rows(batch), self.optimizer.method.probes)

    def flops(self, batch: Sequence[Example]) -> float:
        """See `zotune.bench.work.step_flops`."""
        normalised = self.objective.normalised
        return work.step_flops(self.setting.model, _rows(batch), self.optimizer.method.probes, normalised=normalised)
