"""Replay: the weights of any step of a run, from its base model and its journal, without data or a forward pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zotune import checkpoint
from zotune.errors import ConfigError
from zotune.export.drafts import drafted, refuse_existing
from zotune.export.recipe import Recipe
from zotune.figures import counted
from zotune.paths import StrPath, expand
from zotune.runtimes.base import Runtime


@dataclass(frozen=True)
class Comparison:
    """A replay held against a checkpoint on its way.

    Attributes:
        step: The checkpoint's.
        differing: Names of the tensors that have other bits; none if all is well.
        largest: Largest absolute difference of an element.
    """

    step: int
    differing: tuple[str, ...]
    largest: float

    @property
    def same(self) -> bool:
        """Whether every bit agrees."""
        return not self.differing


@dataclass(frozen=True)
class Replayed:
    """What a replay came to.

    Attributes:
        path: The folder it wrote.
        step: Finished steps that the weights have behind them.
        seconds: Time spent on the steps, loading, comparing and writing left out.
        comparison: With the newest checkpoint up to ``step``; None if there is none.
    """

    path: Path
    step: int
    seconds: float
    comparison: Comparison | None


def replay(
    run: StrPath,
    out: StrPath,
    step: int | None = None,
    *,
    model: StrPath | None = None,
    device: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Replayed:
    """Write the weights after ``step`` finished steps as an ordinary Hugging Face folder.

    They follow from the base model and the journal alone: neither the training data nor a checkpoint is needed. On the
    kind of device that trained, they have the bits that a checkpoint of that step has; another kind rounds its products
    differently.

    Args:
        run: Run directory.
        out: Folder to write; must not exist.
        step: Finished steps, from 0; default: all of the journal.
        model: Folder or hub id of the base model; default: where the run found it.
        device: Where to replay: ``cpu``, ``cuda`` or ``cuda:N``; default: the run's own setting.
        progress: Told how many steps are replayed.

    Raises:
        ConfigError: ``out`` exists or cannot be written, or the run has not so many steps.
        JournalError: The run's journal is damaged, or the base model is not the one that it began with.
        ModelError: The base model or the device is not there.
    """
    out = expand(out)
    refuse_existing(out)
    recipe = _elsewhere(Recipe.of_run(run), model, device)
    last = len(recipe.journal.entries)
    if step is None:
        step = last
    if not 0 <= step <= last:
        have = counted(last, "finished step")
        raise ConfigError(f"{run} has {have}, so there is no step {step}; give one from 0 to {last}")
    base, tokenizer = recipe.load_base()
    runtime = recipe.begin(base)
    comparison = _apply(recipe, runtime, step, progress)
    with drafted(out, folder=True) as folder:
        runtime.export(folder)
        tokenizer.save_pretrained(folder)
    return Replayed(out, step, runtime.timings["apply"], comparison)


def _elsewhere(recipe: Recipe, model: StrPath | None, device: str | None) -> Recipe:
    """The recipe with its base model taken from another place or put on another device."""
    update: dict[str, Any] = {} if model is None else {"path": os.fspath(model), "revision": None}
    if device is not None:
        update["device"] = device
    return replace(recipe, model=recipe.model.model_copy(update=update))


def _apply(recipe: Recipe, runtime: Runtime, stop: int, progress: Callable[[int], None]) -> Comparison | None:
    """Replay ``stop`` steps; the comparison with the newest checkpoint among them."""
    own = recipe.journal.identity
    saved = None if recipe.checkpoints is None else checkpoint.newest(recipe.checkpoints, upto=stop, identity=own)
    comparison = None
    for done, update in enumerate(islice(recipe.updates(), stop), start=1):
        runtime.apply(update)
        if saved is not None and saved[0] == done:
            comparison = _compare(runtime, done, saved[2])
        progress(done)
    return comparison


def _compare(runtime: Runtime, step: int, saved: Mapping[str, Tensor]) -> Comparison:
    """The runtime's state beside a checkpoint's tensors."""
    differing, largest = [], 0.0
    for name, tensor in runtime.state().items():
        other = saved[name]
        if not torch.equal(_bits(tensor), _bits(other)):
            differing.append(name)
            largest = max(largest, float((tensor.double() - other.double()).abs().max()))
    return Comparison(step, tuple(differing), largest)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)
