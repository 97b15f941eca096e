"""Adapter slots: vLLM's own LoRA slots, written in place, for generation under several states in one batch.

A slot is the model as it is tuned now, plus one direction: ``sign * eps * U V^T`` goes into the slot's matrices, and
the update B is in the wrapped layers already (`zotune.runtimes.engine.tokenwise`). So a slot follows every update of
its window without being written again, and no 16-bit sum of B and the direction rounds the smaller one away.

Prefixes are cached, because all prompts of a state often begin alike. The cache cannot know that a slot was rewritten:
each version of a slot has its own salt, and what changes every state, or uses the cache's memory, empties the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from zotune.errors import ConfigError
from zotune.protocol import CLEAN, Probe
from zotune.runtimes import wire

if TYPE_CHECKING:
    from zotune.runtimes.engine.runtime import EngineRuntime

COUNT = 8
"""Slots of an engine."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM has LoRA kernels for (its option --max-lora-rank)."""

_NOT_A_PATH = "zotune-slot"
"""vLLM wants every adapter to have a path; that of one which is registered already is never read."""

STALING = frozenset({"score", "apply", "loaded"})
"""Remote methods after which nothing in the prefix cache is right: scoring, too, writes into its memory."""


def served_rank(rank: int) -> int:
    """The smallest of `RANKS` that is at least this rank; the rank itself where there is none."""
    return next((each for each in RANKS if each >= rank), rank)


def options(settings: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of vLLM's ``LLM`` for the slots that a worker's settings ask for; empty where they ask for none.

    Args:
        settings: What `zotune.runtimes.engine.worker_settings.pack` wrote.
        dtype: The model's.

    Raises:
        ConfigError: Slots cannot hold the method's directions, or vLLM cannot multiply by them here.
    """
    if settings["adapters"] == "none":
        return {}
    scope, rank = settings["method"]["scope"], settings["method"]["rank"]
    if scope != "linear":
        raise ConfigError(
            f"runtime.vllm.adapters = 'lora' takes method.scope = 'linear', got {scope!r}: vLLM's adapter slots hold "
            "linear layers alone, no output head, embeddings or norms. Set runtime.vllm.adapters = 'none' to keep it."
        )
    if dtype == torch.float32 and torch.cuda.is_available():
        raise ConfigError(
            "runtime.vllm.adapters = 'lora' takes no model in float32 on a GPU, where vLLM multiplies by adapters in "
            "16 bits alone. Set model.dtype = 'bfloat16', or runtime.vllm.adapters = 'none'."
        )
    if rank > RANKS[-1]:
        raise ConfigError(f"runtime.vllm.adapters = 'lora' takes a method.rank of at most {RANKS[-1]}, got {rank}")
    return {
        "enable_lora": True,
        # On a CPU, vLLM gives tokens without an adapter the last slot. It is ours, and stays empty.
        "max_loras": COUNT + 1,
        "max_lora_rank": served_rank(rank),
        "lora_target_modules": sorted({name.split(".")[-2] for name, *_ in settings["sites"]}),
        "enable_prefix_caching": True,
    }


def request(slot: int) -> Any:
    """By what a request of the engine names a slot."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"zotune-{slot}", slot + 1, _NOT_A_PATH)


class Slots:
    """The slots of an engine, numbered from 0; each shows the clean model until it is written.

    Args:
        runtime: Started with ``runtime.vllm.adapters = "lora"``.

    Raises:
        ModelError: vLLM has no slot for a layer that holds a site.
    """

    def __init__(self, runtime: EngineRuntime) -> None:
        self._runtime = runtime
        self._held = [CLEAN] * COUNT
        self._writes = itertools.count(1)
        self._salts = [0] * COUNT
        runtime.call("open_slots", COUNT + 1)

    def __len__(self) -> int:
        return COUNT

    def write(self, slot: int, probe: Probe) -> None:
        """Let a slot show a probe from now on.

        Args:
            slot: Its number.
            probe: Of the current window.

        Raises:
            ValueError: There is no such slot, or the probe is of another window.
        """
        self._check(slot)
        self._check_window(probe, f"slot {slot} cannot take it")
        self._runtime.call("write_slot", slot, wire.pack_probe(probe))
        self._held[slot], self._salts[slot] = probe, next(self._writes)

    def clear(self, slot: int) -> None:
        """Let a slot show the clean model again."""
        self.write(slot, CLEAN)

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        slots: Sequence[int],
        *,
        max_new_tokens: int,
        stop: Collection[int] = (),
    ) -> list[list[tuple[int, ...]]]:
        """What each of these slots writes on from every prompt, all in one batch, always taking the likeliest token.

        Args:
            prompts: Token ids, at least one each.
            slots: Numbers of slots.
            max_new_tokens: Most tokens to write, at least 1. A row also ends where the engine's context does.
            stop: Token ids that end a row.

        Returns:
            For each slot, in order, what follows each prompt.

        Raises:
            ValueError: There is no such slot, or what it shows is of a window that has ended.
        """
        for slot in slots:
            self._check(slot)
            self._check_window(self._held[slot], f"write or clear slot {slot}")
        asked = [
            {"prompt_token_ids": list(prompt), "cache_salt": f"zotune-{self._salts[slot]}"}
            for slot in slots
            for prompt in prompts
        ]
        adapters = [request(slot) for slot in slots for _ in prompts]
        answers = self._runtime.write_on(asked, max_new_tokens=max_new_tokens, stop=stop, adapters=adapters)
        return [answers[at : at + len(prompts)] for at in range(0, len(answers), len(prompts))]

    def _check(self, slot: int) -> None:
        if slot not in range(COUNT):
            raise ValueError(f"there is no slot {slot}; the engine has the slots 0 to {COUNT - 1}")

    def _check_window(self, probe: Probe, advice: str) -> None:
        if probe.key is not None and probe.key.window != self._runtime.window:
            raise ValueError(
                f"got a direction of window {probe.key.window}, but the current window is {self._runtime.window}; "
                + advice
            )
