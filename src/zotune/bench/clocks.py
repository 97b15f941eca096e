"""Clocks around the parts of a step, set from outside."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from zotune.bench import work


class Stopwatch:
    """Seconds by what they were spent on.

    Attributes:
        seconds: So far.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def on(self, what: str, act: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What ``act`` gives; its time is counted."""
        began = time.perf_counter()
        found = act(*args, **options)
        self.seconds[what] += time.perf_counter() - began
        return found


class Clocked:
    """Stands for an object, and counts the time of some of its methods.

    Args:
        inner: The object.
        stopwatch: Where to count.
        methods: Names of methods, and as what their time counts.
    """

    def __init__(self, inner: Any, stopwatch: Stopwatch, **methods: str) -> None:
        self._inner, self._stopwatch, self._methods = inner, stopwatch, methods

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        what = self._methods.get(name)
        return found if what is None else partial(self._stopwatch.on, what, found)


class ModelClock:
    """When forwards of a model in this process begin, reach the output head and end.

    There are hooks on the model while the clock is entered. A model that an engine runs elsewhere never calls them, nor
    does one whose forward is replayed as a graph.

    Args:
        model: A causal language model.
        device: Where it is.
        waits: Whether each hook waits until the device is done, so that a phase's time is the device's, too.

    Attributes:
        before: Seconds waited for what was asked of the device before the forward.
        body: Seconds from the beginning of a forward to its output head.
        head: Seconds in the output head.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, *, waits: bool) -> None:
        self.before = self.body = self.head = 0.0
        self._model = model
        self._clock: Callable[[], float] = (lambda: _clock(device)) if waits else time.perf_counter
        self._last = 0.0

    def __enter__(self) -> ModelClock:
        head = self._model.get_output_embeddings()
        self._hooks = [
            self._model.register_forward_pre_hook(self._begins),
            head.register_forward_pre_hook(self._reaches_head),
            head.register_forward_hook(self._ends),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begins(self, *_: Any) -> None:
        asked = time.perf_counter()
        self._last = self._clock()
        self.before += self._last - asked

    def _reaches_head(self, *_: Any) -> None:
        self.body += self._lap()

    def _ends(self, *_: Any) -> None:
        self.head += self._lap()

    def _lap(self) -> float:
        before, self._last = self._last, self._clock()
        return self._last - before


def _clock(device: torch.device) -> float:
    """The time once the device is done, which cannot be waited for while a graph is captured."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return time.perf_counter() if capturing else work.clock(device)
