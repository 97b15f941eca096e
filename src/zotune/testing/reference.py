"""The dense oracle as a runtime: what every other runtime is compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zotune.directions import LowRankDirections
from zotune.layout import Layout, Site
from zotune.optimizer import Method
from zotune.protocol import Probe, Update
from zotune.rows import Row
from zotune.testing import oracle


class OracleRuntime:
    """Implements `zotune.runtimes.base.Runtime` with dense float32 tensors and one sequence at a time.

    An update changes the weights at once, so closing a window folds nothing: it only moves on to the next one and
    carries the momentum over.

    Args:
        model: An unmodified Hugging Face causal language model; it is copied.
        method: The method whose directions are used.
        seed: The run's seed.
        sites: What to tune; by default what the method's scope means for the model.
    """

    def __init__(self, model: nn.Module, method: Method, *, seed: int = 0, sites: Sequence[Site] | None = None) -> None:
        self.layout = Layout(tuple(sites if sites is not None else oracle.sites(model, method.scope)))
        self.method = method
        self.oracle = oracle.DenseOracle(model, self.layout.sites)
        self.directions = oracle.directions(self.layout.sites, method, seed)
        self.fingerprint = self._hash()
        self.window = 0
        self._momentum = [torch.zeros(site.shape) for site in self.layout.sites] if method.momentum else []

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for name, parameter in self.oracle.model.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().numpy().tobytes())
        return digest.hexdigest()

    def score(self, probes: Sequence[Probe], rows: Sequence[Row], *, normalised: bool = True) -> np.ndarray:
        """See `zotune.runtimes.base.Runtime.score`; always normalised.

        Raises:
            ValueError: A probe belongs to another window than the current one.
        """
        return np.stack([self._score(probe, rows) for probe in probes])

    def _score(self, probe: Probe, rows: Sequence[Row]) -> np.ndarray:
        if probe.key is None:
            return self.oracle.score(rows)
        self._check_window(probe.key.window)
        return self.oracle.score(rows, self.directions.dense(probe.key), probe.sign * probe.eps)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[tuple[int, ...]]:
        """See `zotune.runtimes.base.Runtime.generate`; a forward of the whole row for every token, nothing kept."""
        return [self._continue(prompt, max_new_tokens, stop) for prompt in prompts]

    def _continue(self, prompt: tuple[int, ...], max_new_tokens: int, stop: Collection[int]) -> tuple[int, ...]:
        row = list(prompt)
        for _ in range(max_new_tokens):
            row.append(int(self.oracle.model(torch.tensor([row])).logits[0, -1].argmax()))
            if row[-1] in stop:
                break
        return tuple(row[len(prompt) :])

    def _check_window(self, window: int) -> None:
        if window != self.window:
            raise ValueError(f"got window {window}, but the current one is {self.window}")

    def apply(self, update: Update) -> None:
        """``W <- W - lr (sum c D + weight_decay W)``, with the momentum average in place of the sum if there is one.

        Raises:
            ValueError: The update belongs to another window than the current one.
        """
        self._check_window(update.window)
        if update.terms:
            change = [torch.zeros(site.shape) for site in self.layout.sites]
            for key, coefficient in update.terms:
                for total, direction in zip(change, self.directions.dense(key), strict=True):
                    total.add_(direction, alpha=coefficient)
            self.oracle.update(self._averaged(change), update.lr, update.lr * self.method.weight_decay)
        # A dense direction is drawn anew for every step, so every step is a window of its own.
        if update.closes_window or self.method.family == "dense":
            self._turn()

    def _averaged(self, change: list[Tensor]) -> list[Tensor]:
        beta = self.method.momentum
        if not beta:
            return change
        self._momentum = [beta * old + (1 - beta) * new for old, new in zip(self._momentum, change, strict=True)]
        return self._momentum

    def _turn(self) -> None:
        """Next window. LOZO-M's ``N V^T`` becomes ``N (V^T V') / n V'^T`` with the next window's V'."""
        self.window += 1
        if self._momentum and isinstance(self.directions, LowRankDirections):
            for average, v in zip(self._momentum, self.directions.window(self.window), strict=True):
                if v is not None:
                    average.copy_(average @ v @ v.T / (len(v) * self.directions.scale**2))

    def state(self) -> dict[str, Tensor]:
        """Weights of all sites, and the momentum."""
        state = {site.name: w.clone() for site, w in zip(self.layout.sites, self.oracle.weights, strict=True)}
        return state | {f"momentum/{index}": average.clone() for index, average in enumerate(self._momentum)}

    def load_state(self, state: Mapping[str, Tensor], window: int) -> None:
        """Restore what `state` returned."""
        for site, weight in zip(self.layout.sites, self.oracle.weights, strict=True):
            weight.copy_(state[site.name])
        self._momentum = [state[f"momentum/{index}"].clone() for index in range(len(self._momentum))]
        self.window = window

    def export(self, path: Path) -> None:
        """Write the float32 model as a Hugging Face folder."""
        self.oracle.model.save_pretrained(path)

    def close(self) -> None:
        """Nothing has to be given back: the model is the oracle's own copy."""
