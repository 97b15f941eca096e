"""The driver's side of the vLLM runtime: a step is one call for scores and one for the update."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune import models
from zotune.config import EngineConfig, ModelConfig, RuntimeConfig
from zotune.data import Dataset
from zotune.errors import ConfigError, EngineError, JournalError, ModelError, reason
from zotune.evaluate import MAX_NEW_TOKENS
from zotune.layout import Layout, Site
from zotune.optimizer import Method
from zotune.protocol import Probe, Update
from zotune.rows import Row
from zotune.runtimes import precision, wire
from zotune.runtimes.embedded import EmbeddedRuntime, lora, twin
from zotune.runtimes.engine import checkpoint_layout, handshake, launch, shards, slots, worker_settings
from zotune.runtimes.engine.bank import settled
from zotune.runtimes.engine.batch import Prepared
from zotune.runtimes.engine.lifeline import Lifeline
from zotune.runtimes.sites import find_sites

_LEAST_TOKENS = 2048
"""Evaluations, too, are scored in forwards of so many tokens."""


@dataclass(frozen=True)
class Work:
    """What an engine is to be made ready for.

    Attributes:
        step_tokens: Tokens of a step's forward, all probes counted, about.
        longest: Tokens of the longest sequence, what is generated counted.
        largest: Tokens of the largest row, all its sequences counted.
    """

    step_tokens: int
    longest: int
    largest: int

    def forward_tokens(self, limit: int) -> int:
        """Most tokens of a forward: enough for a step, a multiple of 256, within the limit if every row fits."""
        wanted = max(_LEAST_TOKENS, -(-self.step_tokens * 5 // 4 // 256) * 256)
        return max(min(limit, wanted), self.longest, self.largest)

    @classmethod
    def of(cls, data: Dataset, batch_size: int, method: Method) -> Work:
        """The work of a run on this data."""
        rows = [Prepared.of(example.row) for example in (*data.train, *data.validation)]
        written = MAX_NEW_TOKENS if any(example.answers for example in data.validation) else 1
        longest = max(len(tokens) for row in rows for tokens in row.sequences) + written
        mean = sum(row.n_tokens for row in rows) / len(rows)
        largest = max(row.n_tokens for row in rows)
        return cls(int(batch_size * method.probes * mean), longest, largest)


class EngineRuntime:
    """Implements `zotune.runtimes.base.Runtime` on stock vLLM.

    Args:
        llm: vLLM's ``LLM``, whose workers are `zotune.runtimes.engine.internals.Worker`.
        layout: The sites that the workers were started with.
        fingerprint: Of the base weights.
        processes: What the engine consists of besides this process.
        embedded: Gives the same run's runtime in this process, with the weights that the run began with.

    Attributes:
        llm: The engine; its own requests see the tuned model as it is now.
        window: The current one.
        slots: Adapter slots, where the engine was started with them.
    """

    def __init__(
        self,
        llm: Any,
        layout: Layout,
        fingerprint: str,
        embedded: Callable[[], EmbeddedRuntime],
        processes: Lifeline,
    ) -> None:
        self.llm, self.layout, self.fingerprint, self._embedded = llm, layout, fingerprint, embedded
        self._processes = processes
        self.window = 0
        self.slots: slots.Slots | None = None
        self._numbers: dict[Row, int] = {}
        self._news: list[str] = []
        self._cuts = 0

    @classmethod
    def start(
        cls, config: ModelConfig, model: Any, method: Method, *, seed: int, options: RuntimeConfig, work: Work
    ) -> EngineRuntime:
        """Start an engine on a checkpoint, and prove that it runs what zotune believes it runs.

        Args:
            config: The checkpoint.
            model: The same as transformers has it, which may be mapped from its files; it is only read, and not kept. A
                method that tunes LoRA matrices adds them to it.
            method: What to tune, and how directions look.
            seed: The run's seed.
            options: The table ``[runtime]``.
            work: What to be ready for.

        Raises:
            ModelError: vLLM cannot load the model, or a part of it cannot be tuned exactly.
            ConfigError: vLLM is not there, or not as it must be.
        """
        if dense := method.family == "dense":
            _refuse_for_dense(options.vllm)
        # Before anything is added to the model.
        fingerprint = checkpoint_layout.fingerprint(config, model)
        weights = find_sites(model, method.scope if method.lora_rank is None else "linear")
        fresh = {} if method.lora_rank is None else _added(model, method, seed)
        layout = Layout(tuple(fresh or weights))
        most = work.forward_tokens(options.max_tokens)
        settings = worker_settings.pack(method, layout, seed, options)
        start = partial(
            launch.start,
            config,
            settings,
            dtype=precision.name(model.dtype),
            max_tokens=most,
            max_rows=min(512, most),
            longest=min(max(work.longest, handshake.LONGEST), models.context_length(model)),
            compile=False if dense else options.vllm.compile,
            tensor_parallel=options.vllm.tensor_parallel,
            own_process=options.vllm.own_process,
            weight_bytes=sum(weight.numel() for weight in model.parameters()) * model.dtype.itemsize,
            batch_tokens=work.step_tokens,
            threads=options.threads,
            memory_fraction=options.vllm.memory_fraction,
            **slots.options(settings, model.dtype),
        )
        llm, processes = Lifeline.around(start)
        embedded = partial(twin, config, method, seed=seed, fold=options.fold)
        runtime = cls(llm, layout, fingerprint, embedded, processes)
        try:
            for site, tensor in fresh.items():
                runtime.call("begin", site.name, wire.pack_tensor(tensor))
            known = {site.name: each for site, each in (weights | fresh).items() if not each.is_meta}
            handshake.check(runtime, known, model)
            if options.vllm.adapters == "lora":
                runtime.slots = slots.Slots(runtime)
        except BaseException:
            runtime.close()
            raise
        return runtime

    def score(self, probes: Sequence[Probe], rows: Sequence[Row], *, normalised: bool = True) -> np.ndarray:
        """Log-likelihoods, float32 ``(probes, candidates)``; see `zotune.runtimes.base.Runtime.score`."""
        self._send(rows)
        asked = [wire.pack_probe(probe) for probe in probes]
        answers = self.call("score", asked, [self._numbers[row] for row in rows], normalised)
        logits = sum(_floats(answer[0], len(probes)) for answer in answers)
        normalisers = np.logaddexp.reduce([_floats(answer[1], len(probes)) for answer in answers])
        scores = logits - normalisers if normalisers.size else logits
        counts = [len(candidate.scored) for row in rows for candidate in row.candidates]
        found: np.ndarray = np.add.reduceat(scores, np.cumsum([0, *counts[:-1]]), axis=1)
        return found

    def _send(self, rows: Sequence[Row]) -> None:
        """Send what the workers do not have yet."""
        new = {row: len(self._numbers) + i for i, row in enumerate({row for row in rows if row not in self._numbers})}
        if new:
            self.call("rows", {str(number): wire.pack_row(row) for row, number in new.items()})
            self._numbers |= new

    def generate(
        self, prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[tuple[int, ...]]:
        """What the clean model writes on; see `zotune.runtimes.base.Runtime.generate`."""
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self.write_on(asked, max_new_tokens=max_new_tokens, stop=stop)

    def write_on(
        self,
        prompts: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int,
        stop: Collection[int],
        adapters: Sequence[Any] | None = None,
    ) -> list[tuple[int, ...]]:
        """As `generate`, from prompts as vLLM has them, perhaps with a LoRA request each."""
        from vllm import SamplingParams

        options = SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=list(stop), ignore_eos=True, detokenize=False
        )
        act = partial(self.llm.generate, list(prompts), options, use_tqdm=False, lora_request=adapters)
        return [tuple(answer.outputs[0].token_ids) for answer in self._ask(act)]

    def apply(self, update: Update) -> None:
        """Change the weights in factor space; fold at the end of a window."""
        cuts, self.window = self.call("apply", wire.pack_update(update))[0]
        if cuts > self._cuts:
            self._note_cuts()

    def _note_cuts(self) -> None:
        """Tell what it has cost that the update bank was full, where a base cannot be folded into."""
        bank = self.call("bank")[0]
        for step, worst, mean in bank["recompressed"][self._cuts :]:
            self._news.append(
                f"step {step + 1}: the update bank was full, and is cut to the nearest of half its {bank['budget']} "
                f"columns; with all cuts so far a relative error of {mean:.1e} on average, {worst:.1e} at worst"
            )
        self._cuts = len(bank["recompressed"])

    def news(self) -> list[str]:
        """What people should know of what has happened since this was last asked, in a line each."""
        news, self._news = self._news, []
        return news

    def state(self) -> dict[str, Tensor]:
        """Tuned weights as last folded, accumulated update and rule state, as CPU tensors."""
        shapes = {site.name: site.shape for site in self.layout.sites}
        return {name: self._whole(name, shapes) for name in self.call("state_names")[0]}

    def _whole(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
        """A tensor of the state, put together from every worker's piece."""
        answers = self.call("tensor", name)
        pieces = [wire.tensor(piece) for piece, _ in answers]
        if len(answers) == 1 or answers[0][1] is None:
            return pieces[0]
        whole = torch.zeros(shapes[name.partition("/")[2]], dtype=pieces[0].dtype)
        for piece, (_, place) in zip(pieces, answers, strict=True):
            shards.put(whole, *shards.unpack(place), piece)
        return whole

    def load_state(self, state: Mapping[str, Tensor], window: int) -> None:
        """Restore what `state` returned while ``window`` was current.

        Raises:
            JournalError: The tensors are not those of this layout and method.
        """
        expected = set(self.call("state_names")[0])
        if odd := sorted(expected ^ set(state)):
            raise JournalError(f"the saved state does not fit this model and method: {odd[0]!r} differs")
        for name, tensor in state.items():
            self.call("load", name, wire.pack_tensor(tensor))
        self.call("loaded", window)
        self.window = window

    def export(self, path: Path) -> None:
        """Write the tuned model as an ordinary Hugging Face folder: the base with this state, in this process."""
        state = settled(self.state())
        twin = self._embedded()
        twin.load_state(state, self.window)
        twin.export(path)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds that the first worker spent so far, by phase."""
        return dict(self.call("timings")[0])

    def call(self, method: str, *args: Any) -> list[Any]:
        """Every worker's answer to one of the methods ``on_...`` of `zotune.runtimes.engine.tuner.Tuner`."""
        answers: list[Any] = self._ask(partial(self.llm.collective_rpc, "zotune", args=(method, *args)))
        if self.slots is not None and method in slots.STALING and not self._ask(self.llm.reset_prefix_cache):
            raise EngineError("vLLM's prefix cache cannot be emptied while requests are running; wait for their ends")
        return answers

    def _ask(self, act: Callable[[], Any]) -> Any:
        """What the engine answers; says what happened where it fails."""
        try:
            return self._processes.call(act)
        except (ModelError, ValueError):
            raise
        except Exception as error:
            raise EngineError(
                f"vLLM's engine failed: {reason(error)}. If a run has begun, every finished step is in its journal, "
                "and `zotune resume` goes on from there."
            ) from error

    def close(self) -> None:
        """Shut the engine down and end its processes."""
        # A second time would take from this process what another engine needs.
        if self.llm is not None:
            launch.stop(self.llm)
            self._processes.cut()
        self.llm = None


def _added(model: Any, method: Method, seed: int) -> dict[Site, Tensor]:
    """LoRA matrices, added to the driver's model as PEFT does; its own weights are only read.

    Raises:
        ModelError: The model has no layers for them, or its own weights are quantised.
    """
    assert method.lora_rank is not None
    lora.add(model, method.lora_rank, method.lora_alpha, seed)
    found = find_sites(model, method.scope, lora=True)
    if any(tensor.is_meta for tensor in found.values()):
        raise ModelError(
            "LoRA matrices are made for weights in plain form, and this model's are quantised. Use a low-rank preset, "
            "such as lozo, with runtime.vllm.bank_rank, or an unquantised model."
        )
    return found


def _refuse_for_dense(options: EngineConfig) -> None:
    """Refuse what directions have to be low-rank for.

    Raises:
        ConfigError: It is asked for.
    """
    refused = {
        "compile": (options.compile, "its directions are drawn while a layer is called, so in no captured graph"),
        "bank_rank": (options.bank_rank, "its updates have full rank, and go into the weights with every step"),
        "adapters": (options.adapters != "none" and options.adapters, "its directions have full rank, slots do not"),
    }
    for name, (value, why) in refused.items():
        if value:
            raise ConfigError(
                f"runtime.vllm.{name} = {str(value).lower()} means nothing for a preset with dense directions: {why}. "
                "Leave it out, or use a low-rank preset, such as lozo."
            )


def _floats(data: bytes, probes: int) -> np.ndarray:
    return np.frombuffer(data, dtype=np.float32).reshape(probes, -1)
