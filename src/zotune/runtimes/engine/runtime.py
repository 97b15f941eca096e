"""The driver's side of the vLLM runtime."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.layout import Layout
from zotune.protocol import Probe, Update
from zotune.rows import Row
from zotune.runtimes.engine import wire


class EngineRuntime:
    """Implements `zotune.runtimes.base.Runtime` on a running vLLM engine.

    Args:
        llm: vLLM's ``LLM``, whose workers are `zotune.runtimes.engine.internals.Worker`.
        layout: The sites that the workers were started with.
        fingerprint: Of the base weights.
    """

    def __init__(self, llm: Any, layout: Layout, fingerprint: str) -> None:
        self.llm, self.layout, self.fingerprint = llm, layout, fingerprint
        self._numbers: dict[Row, int] = {}

    def score(self, probes: Sequence[Probe], rows: Sequence[Row], *, normalised: bool = True) -> np.ndarray:
        """Log-likelihoods, float32 ``(probes, candidates)``; see `zotune.runtimes.base.Runtime.score`."""
        new = {row: None for row in rows if row not in self._numbers}
        if new:
            numbered = {len(self._numbers) + i: row for i, row in enumerate(new)}
            self._call("rows", {number: wire.pack_row(row) for number, row in numbered.items()})
            self._numbers |= {row: number for number, row in numbered.items()}
        asked = [wire.pack_probe(probe) for probe in probes]
        answers = self._call("score", asked, [self._numbers[row] for row in rows], normalised)
        logits = sum(self._floats(answer[0], len(probes)) for answer in answers)
        normalisers = np.logaddexp.reduce([self._floats(answer[1], len(probes)) for answer in answers])
        scores = logits - normalisers if normalisers.size else logits
        counts = [len(candidate.scored) for row in rows for candidate in row.candidates]
        return np.add.reduceat(scores, np.cumsum([0, *counts[:-1]]), axis=1)

    def _floats(self, data: bytes, probes: int) -> np.ndarray:
        return np.frombuffer(data, dtype=np.float32).reshape(probes, -1)

    def generate(
        self, prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[tuple[int, ...]]:
        """What the clean model writes on; see `zotune.runtimes.base.Runtime.generate`."""
        from vllm import SamplingParams, TokensPrompt

        options = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=list(stop), ignore_eos=True, detokenize=False)
        asked = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        answers = self.llm.generate(asked, options, use_tqdm=False)
        return [tuple(answer.outputs[0].token_ids) for answer in answers]

    def apply(self, update: Update) -> None:
        """Change the weights in factor space; fold at the end of a window."""
        self._call("apply", wire.pack_update(update))

    def state(self) -> dict[str, Tensor]:
        """Tuned weights as last folded, accumulated update and rule state, as CPU tensors."""
        return {name: self._gather(self._call("tensor", name)) for name in self._call("state_names")[0]}

    def _gather(self, pieces: Sequence[Any]) -> Tensor:
        return wire.tensor(pieces[0][0])

    def load_state(self, state: Mapping[str, Tensor], window: int) -> None:
        """Restore what `state` returned while ``window`` was current."""
        self._call("load", {name: wire.pack_tensor(tensor) for name, tensor in state.items()}, window)

    def export(self, path: Path) -> None:
        """."""

    @property
    def timings(self) -> dict[str, float]:
        """Seconds that the first worker spent so far, by phase."""
        return dict(self._call("timings")[0])

    def _call(self, method: str, *args: Any) -> list[Any]:
        """Every worker's answer."""
        return self.llm.collective_rpc("zotune", args=(method, *args))
