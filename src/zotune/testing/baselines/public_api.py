"""The way through vLLM's public interface: ``LLM.generate`` with a LoRA request for every parameter state.

Source: the comparison that the authors of LOZO on vLLM make with plain ``generate(prompt_logprobs=...)``. Nothing of
zotune runs inside the engine: this process keeps the update and draws the directions, writes the adapter of each state
as a file, ``A = V^T`` and ``B + s eps U``, and asks for log-probabilities.

A step on n examples of c candidates costs 2 n c whole sequences with the vocabulary's normaliser at every position; or,
where every candidate is one token, 2 n prompts, their normalisers at the last position only (``logprob_token_ids``).
Besides that come as many requests, two adapter files, and vLLM's loading of both.

Deviations: linear layers only, as vLLM's adapters allow; plain SGD. Nobody outside an engine can fold into its weights,
so a window that has ended stays a part of the adapter, whose rank grows by ``rank`` with each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from zotune.config import ModelConfig, RuntimeConfig
from zotune.errors import ConfigError
from zotune.layout import Layout, Site
from zotune.optimizer import Method
from zotune.protocol import Probe, Update
from zotune.rows import Row
from zotune.runtimes import precision
from zotune.runtimes.engine import launch, worker_settings
from zotune.runtimes.engine.slots import RANKS, served_rank
from zotune.runtimes.folding.fold import Fold
from zotune.runtimes.folding.move import Move
from zotune.runtimes.sites import find_sites
from zotune.runtimes.spaces.lowrank import LowRankMatrix, LowRankSpace
from zotune.runtimes.timings import Timings
from zotune.testing.baselines.lora_slots import log_likelihoods, scoring, sequences

_MOST_TOKENS = 2048


class PublicApi:
    """Scores and learns as a runtime does, through a stock engine.

    Args:
        config: The checkpoint.
        model: The same as transformers has it; it is only read, and not kept.
        method: Low-rank, of the scope ``linear``, without momentum and weight decay.
        seed: The run's seed.
        windows: That the adapters must have room for.
        longest: Most tokens of a sequence.

    Attributes:
        timings: Seconds spent so far: ``draw`` is writing adapters, ``forward`` vLLM's loading them and answering
            requests.

    Raises:
        ConfigError: An adapter cannot hold what the method learns, or vLLM is not there.
        ModelError: vLLM cannot load the model.
    """

    def __init__(
        self, config: ModelConfig, model: Any, method: Method, *, seed: int = 0, windows: int = 1, longest: int = 256
    ) -> None:
        if (method.family, method.scope, method.momentum, method.weight_decay) != ("low-rank", "linear", 0.0, 0.0):
            raise ConfigError(
                "vLLM's adapters hold linear layers alone and are never folded: give a low-rank method of scope "
                f"'linear' without momentum and weight decay, got {method}"
            )
        self._room = served_rank(method.rank * windows)
        if self._room > RANKS[-1]:
            raise ConfigError(f"{windows} windows of rank {method.rank} are more than vLLM's {RANKS[-1]}; give fewer")
        self._weights = dict.fromkeys(find_sites(model, method.scope), torch.empty(0))
        self._space = LowRankSpace(tuple(self._weights), method, seed, torch.device("cpu"))
        self._matrices = {site: cast("LowRankMatrix", state) for site, state in self._space.sites.items()}
        self._ended = _Ended(self._matrices)
        self._states = itertools.count(1)
        self.timings = Timings.of("draw", "forward", "apply")
        self._targets = sorted({site.name.split(".")[-2] for site in self._weights})
        self.llm = launch.start(
            config,
            worker_settings.pack(method, Layout(tuple(self._weights)), seed, RuntimeConfig(type="vllm")),
            dtype=precision.name(model.dtype),
            max_tokens=max(_MOST_TOKENS, longest),
            max_rows=256,
            longest=longest,
            worker_cls="auto",
            additional_config={},
            enable_lora=True,
            max_loras=2,
            max_lora_rank=self._room,
            lora_target_modules=self._targets,
        )

    def score(self, probes: Sequence[Probe], rows: Sequence[Row], *, normalised: bool = True) -> np.ndarray:
        """Log-likelihoods, float32 ``(probes, candidates)``; always normalised.

        Args:
            probes: All of the current window.
            rows: Any number.
            normalised: Without effect.
        """
        ask = self._ask_tokens if all(row.single_token for row in rows) else self._ask_prompts
        with TemporaryDirectory() as folder:
            return np.stack([ask(self._state(probe, Path(folder)), rows) for probe in probes])

    def _ask_prompts(self, adapter: Any, rows: Sequence[Row]) -> np.ndarray:
        return log_likelihoods(self._generate(sequences(rows), scoring(), adapter), rows)

    def _ask_tokens(self, adapter: Any, rows: Sequence[Row]) -> np.ndarray:
        """One prompt per row, and of the token that follows only what the candidates need."""
        from vllm import SamplingParams

        tokens = [[candidate.tokens[0] for candidate in row.candidates] for row in rows]
        options = [
            SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=each, detokenize=False) for each in tokens
        ]
        answers = self._generate([{"prompt_token_ids": list(row.prompt)} for row in rows], options, adapter)
        found = [
            answer.outputs[0].logprobs[0][token].logprob
            for answer, each in zip(answers, tokens, strict=True)
            for token in each
        ]
        return np.array(found, dtype=np.float32)

    def _generate(self, prompts: list[dict[str, Any]], options: Any, adapter: Any) -> Any:
        with self.timings.timed("forward"):
            return self.llm.generate(prompts, options, lora_request=adapter, use_tqdm=False)

    def _state(self, probe: Probe, folder: Path) -> Any:
        with self.timings.timed("draw"):
            return self._adapter(probe, folder)

    def _adapter(self, probe: Probe, folder: Path) -> Any:
        """A LoRA request for the state of a probe, whose adapter is written to a folder of its own."""
        from peft import LoraConfig
        from vllm.lora.request import LoRARequest

        number = next(self._states)
        path = folder / f"state-{number}"
        factors = [
            (torch.cat([*self._ended.updates[site], shown], 1), torch.cat([*self._ended.bases[site], state.v], 1))
            for (site, state), shown in zip(self._matrices.items(), self._shown(probe), strict=True)
        ]
        names = [f"base_model.model.{site.name.removesuffix('.weight')}" for site in self._matrices]
        tensors = {f"{name}.lora_A.weight": v.T.contiguous() for name, (_, v) in zip(names, factors, strict=True)}
        tensors |= {f"{name}.lora_B.weight": b for name, (b, _) in zip(names, factors, strict=True)}
        rank = factors[0][0].shape[1]
        if rank > self._room:
            raise ConfigError(f"the adapter has rank {rank}, and the engine was started for {self._room}: more windows")
        LoraConfig(r=rank, lora_alpha=rank, target_modules=self._targets).save_pretrained(str(path))
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        return LoRARequest(f"state-{number}", number, str(path))

    def _shown(self, probe: Probe) -> list[Tensor]:
        """``B + s eps U`` of every site."""
        space = self._space
        updates = [state.update for state in self._matrices.values()]
        if probe.key is None:
            return updates
        if probe.key.window != space.window:
            raise ValueError(f"got a direction of window {probe.key.window}; the current window is {space.window}")
        drawn = space.directions.factors.views(space.directions.draw(probe.key))
        return [b.add(u, alpha=probe.sign * probe.eps) for b, u in zip(updates, drawn, strict=True)]

    def apply(self, update: Update) -> None:
        """Move B by the update; what a window that ends has learnt stays in the adapter."""
        with self.timings.timed("apply"):
            self._space.apply(update, self._weights, self._ended)

    def close(self) -> None:
        """Shut the engine down."""
        launch.stop(self.llm)


class _Ended(Fold):
    """Keeps the factors of the windows that have ended."""

    def __init__(self, matrices: dict[Site, LowRankMatrix]) -> None:
        self._matrices = matrices
        self.updates: dict[Site, list[Tensor]] = {site: [] for site in matrices}
        self.bases: dict[Site, list[Tensor]] = {site: [] for site in matrices}

    def add(self, move: Move, step: int) -> None:
        """Take the factors of what would move the weight."""
        self.updates[move.site].append(self._matrices[move.site].update.clone())
        self.bases[move.site].append(self._matrices[move.site].v)
