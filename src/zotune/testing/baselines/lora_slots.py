"""The paper's way through vLLM: two adapter slots, plus and minus, rewritten in place at every step.

Source: the paper that runs LOZO on vLLM, as its authors describe their own code. A sequence per candidate and sign goes
through vLLM's ordinary request path, with the adapter of its sign, and is scored by its prompt's log-probabilities.

A step on n examples of c candidates costs 2 n c whole sequences, with the vocabulary's normaliser at every position, as
many requests, one generated token of each, and two writes of every site's factors.

Deviations: stock vLLM in place of a fork, through zotune's adapter slots, which hold the direction alone: the update is
in zotune's wrapped layers, in float32, where the paper keeps both in 16 bits in the slot. Linear layers only, no head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from zotune.errors import ConfigError
from zotune.protocol import Probe, Update
from zotune.rows import Row
from zotune.runtimes.engine.slots import request
from zotune.runtimes.timings import Timings

if TYPE_CHECKING:
    from zotune.runtimes.engine.runtime import EngineRuntime

SLOTS = 2
"""Plus and minus."""


class LoraSlots:
    """Scores as a runtime does, through two slots of one.

    Args:
        runtime: Started with ``runtime.vllm.adapters = "lora"``.

    Attributes:
        timings: Seconds spent so far: ``draw`` is writing slots, ``forward`` vLLM's answering of requests.

    Raises:
        ConfigError: It was started without.
    """

    def __init__(self, runtime: EngineRuntime) -> None:
        if runtime.slots is None:
            raise ConfigError("adapter slots need an engine that was started with runtime.vllm.adapters = 'lora'")
        self._runtime, self._slots = runtime, runtime.slots
        self._steps = itertools.count()
        self.timings = Timings.of("draw", "forward", "apply")

    def score(self, probes: Sequence[Probe], rows: Sequence[Row], *, normalised: bool = True) -> np.ndarray:
        """Log-likelihoods, float32 ``(probes, candidates)``; always normalised, two probes at a time.

        Args:
            probes: All of the current window.
            rows: Any number.
            normalised: Without effect.
        """
        pairs = [probes[at : at + SLOTS] for at in range(0, len(probes), SLOTS)]
        return np.concatenate([self._score(pair, rows) for pair in pairs])

    def _score(self, probes: Sequence[Probe], rows: Sequence[Row]) -> np.ndarray:
        with self.timings.timed("draw"):
            for slot, probe in enumerate(probes):
                self._slots.write(slot, probe)
        # A salt of its own for every state: what another one left in the prefix cache must not be taken for it.
        salts = [f"zotune-slots-{next(self._steps)}" for _ in probes]
        asked = [prompt | {"cache_salt": salt} for salt in salts for prompt in sequences(rows)]
        adapters = [request(slot) for slot in range(len(probes)) for _ in range(len(asked) // len(probes))]
        with self.timings.timed("forward"):
            answers = self._runtime.llm.generate(asked, scoring(), lora_request=adapters, use_tqdm=False)
        share = len(answers) // len(probes)
        return np.stack([log_likelihoods(answers[at : at + share], rows) for at in range(0, len(answers), share)])

    def apply(self, update: Update) -> None:
        """See `zotune.runtimes.base.Runtime.apply`."""
        with self.timings.timed("apply"):
            self._runtime.apply(update)

    def close(self) -> None:
        """Shut the engine down."""
        self._runtime.close()


def sequences(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """vLLM's prompts: every candidate of every row behind its prompt."""
    return [{"prompt_token_ids": [*row.prompt, *each.tokens]} for row in rows for each in row.candidates]


def scoring() -> Any:
    """vLLM's options for the log-probabilities of a prompt's own tokens; it has to generate a token, too."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)


def log_likelihoods(answers: Sequence[Any], rows: Sequence[Row]) -> np.ndarray:
    """What vLLM's answers to `sequences` say of each candidate's scored tokens, float32 ``(candidates,)``."""
    pairs = [(row.prompt, candidate) for row in rows for candidate in row.candidates]
    found = [
        sum(answer.prompt_logprobs[len(prompt) + at][candidate.tokens[at]].logprob for at in candidate.scored)
        for answer, (prompt, candidate) in zip(answers, pairs, strict=True)
    ]
    return np.array(found, dtype=np.float32)
