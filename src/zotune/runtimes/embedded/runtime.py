"""The embedded runtime: a Hugging Face causal language model in this process, wrapped in place."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from zotune import models
from zotune.config import ModelConfig
from zotune.errors import JournalError, ModelError
from zotune.layout import Layout, period
from zotune.optimizer import Method
from zotune.protocol import CLEAN, Probe, Update
from zotune.rows import Row
from zotune.runtimes import sites
from zotune.runtimes.embedded import attention, generation, graphs, heap, lora, modules, rotary, siblings
from zotune.runtimes.embedded.ahead import Ahead
from zotune.runtimes.embedded.crown import Crown
from zotune.runtimes.embedded.trial import Trial
from zotune.runtimes.embedded.trunk import Trunk
from zotune.runtimes.fingerprint import digest
from zotune.runtimes.folding.fold import chosen_fold
from zotune.runtimes.packing import ACTIVATIONS, Pack, cut, pack
from zotune.runtimes.precision import product_dtype
from zotune.runtimes.spaces import appended
from zotune.runtimes.spaces.dense import DenseSpace
from zotune.runtimes.spaces.lowrank import LowRankSpace
from zotune.runtimes.spaces.mixture import grouped
from zotune.runtimes.timings import Timings


class EmbeddedRuntime:
    """Implements `zotune.runtimes.base.Runtime` on a model in this process.

    Args:
        model: A causal language model of transformers. It is wrapped in place and kept; `close` gives it back.
        method: What to tune, and how directions look.
        seed: The run's seed.
        fold: ``stochastic`` or ``master``; see `zotune.runtimes.folding.fold`.
        max_tokens: Tokens of one forward, all probes counted; larger batches are cut.

    Attributes:
        layout: The sites.
        fingerprint: Of the base weights.
        timings: Seconds spent so far, by phase; a GPU is waited for in ``read``.

    Raises:
        ModelError: A part of the model cannot be tuned exactly in the method's scope, the model cannot read packs, or
            another runtime has it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        *,
        seed: int = 0,
        fold: str = "stochastic",
        max_tokens: int = 16384,
    ) -> None:
        if model.config.get_text_config()._attn_implementation == attention.NAME:
            raise ModelError("this model is wrapped by another EmbeddedRuntime; close that one first")
        self.model, self.method, self.max_tokens = model.eval(), method, max_tokens
        self.fingerprint = digest(model.named_parameters())
        # Before anything of the model is wrapped or stored elsewhere.
        trial = Trial(model)
        if method.lora_rank is not None:
            lora.add(model, method.lora_rank, method.lora_alpha, seed)
        find_sites = partial(sites.find_sites, model, method.scope, lora=method.lora_rank is not None)
        self.layout = Layout(tuple(find_sites()))
        self._siblings: list[siblings.Siblings] = []
        self.space: LowRankSpace | DenseSpace
        if method.family == "low-rank":
            tuned = {site.name for site in self.layout.sites}
            self._siblings = siblings.find(model, partial(appended.room, tuned=tuned, method=method))
            product = product_dtype(model.dtype, model.device.type)
            self.space = LowRankSpace(self.layout.sites, method, seed, model.device, product)
        else:
            self.space = DenseSpace(self.layout.sites, method, seed, model.device)
        # Once more, because siblings' weights are stored elsewhere now.
        self._weights = find_sites()
        self._fold = chosen_fold(fold, seed, self._weights)
        self._directions = method.directions if any(each.room for each in self._siblings) else math.inf
        self._period = period(self.layout.sites)
        self._spans = attention.takes_spans(model)
        self._graphs: graphs.Graphs | None = None
        self._ahead: Ahead | None = None
        # Decay changes numbers in the operations themselves, and dense directions are drawn among them.
        if self._spans and isinstance(self.space, LowRankSpace) and method.weight_decay == 0.0:
            self._graphs, self._ahead = graphs.Graphs(model.device), Ahead(self._packed, self.space.directions)
        if model.device.type == "cpu":
            heap.keep_freed()
        self._wrap()
        self.timings = Timings.of("draw", "pack", "forward", "ahead", "read", "apply")
        try:
            self._try(trial)
        except Exception:
            self.close()
            raise

    def _wrap(self) -> None:
        """Give the model's modules other forwards, and its attention packs to follow, until `close`."""
        self._shape = modules.Shape()
        self._crown = Crown(self.model, self._shape)
        modules.wrap(self.model, {site.name: state for site, state in self.space.sites.items()}, self._shape)
        rotary.wrap(self.model)
        for each in self._siblings:
            each.wrap(self._shape, self.method.directions)
        self._trunk = Trunk(self.model, self.layout, self._shape)
        self._attention_before = self.model.config._attn_implementation
        self.model.set_attn_implementation(attention.NAME)

    def _try(self, trial: Trial) -> None:
        """Make sure that packs give what the model does; a trunk that it cannot have is left out."""
        if self.model.config.get_text_config()._attn_implementation != attention.NAME:
            raise trial.refusal("its attention is its own")
        trial.require(partial(self._clean_scores, blocks=1))
        if self._trunk.branches:
            try:
                trial.require(partial(self._clean_scores, blocks=2))
            except ModelError:
                # Such as keys and values that upper layers take from lower ones.
                self._trunk.close()

    @torch.inference_mode()
    def _clean_scores(self, rows: Sequence[Row], blocks: int) -> np.ndarray:
        """Scores of the clean model, of the last of so many equal blocks; see `trial.Scores`."""
        self.space.probe([CLEAN] * blocks)
        self.space.show()
        packed = pack(rows, normalised=False, spans=self._spans)
        return self._read(self._forward(packed.to(self.model.device), blocks), packed)[-1]

    @torch.inference_mode()
    def score(self, probes: Sequence[Probe], rows: Sequence[Row], *, normalised: bool = True) -> np.ndarray:
        """Log-likelihoods, float32 ``(probes, candidates)``; see `zotune.runtimes.base.Runtime.score`."""
        if not probes or not rows:
            return np.zeros((len(probes), sum(len(row.candidates) for row in rows)), dtype=np.float32)
        costs = [self._cost(row, normalised) for row in rows]
        most, largest = len(probes), max(costs)
        while most > 1 and most * largest > self.max_tokens:
            # By halves, because what blocks see is kept for every number of them that there was.
            most = -(-most // 2)
        together = list(grouped(probes, most, self._directions))
        alone = len(together) == 1
        return np.concatenate([self._score_blocks(part, rows, costs, normalised, alone) for part in together])

    def expect(self, probes: Sequence[Probe], rows: Sequence[Row], *, normalised: bool = True) -> None:
        """What will be asked next but one; see `zotune.runtimes.base.Foresees.expect`."""
        if self._ahead is not None:
            self._ahead.expect(probes, rows, normalised)

    def _score_blocks(
        self, probes: Sequence[Probe], rows: Sequence[Row], costs: Sequence[int], normalised: bool, alone: bool
    ) -> np.ndarray:
        with self.timings.timed("draw"):
            self.space.probe(probes)
        found, parts = [], list(cut(costs, self.max_tokens // len(probes)))
        for part in parts:
            with self.timings.timed("pack"):
                pack = self._packed if self._ahead is None else self._ahead.pack
                packed = pack(rows[part], normalised)
            scores = self._scored(packed, len(probes))
            # Where a step is many forwards, so is the next, and has no such pack.
            if self._ahead is not None and alone and len(parts) == 1:
                with self.timings.timed("ahead"):
                    self._ahead.get_ready()
            with self.timings.timed("read"):
                found.append(self._read(scores, packed))
        return np.concatenate(found, axis=1)

    def _packed(self, rows: Sequence[Row], normalised: bool) -> Pack:
        if self._graphs is not None and all(row.single_token for row in rows):
            rows = [*rows, graphs.filler(sum(row.n_tokens for row in rows))]
        return pack(rows, normalised=normalised, spans=self._spans)

    def _scored(self, packed: Pack, blocks: int) -> Tensor:
        """Log-likelihoods of all scored tokens, float32 ``(blocks, n)``, perhaps still being computed."""
        space = self.space
        whole = packed.spans is not None and packed.spans.seen is None
        if self._graphs is not None and whole and isinstance(space, LowRankSpace):
            assert space.stage is not None
            forward, state = partial(self._shown_forward, blocks=blocks), (id(space.stage), space.window % self._period)
            with self.timings.timed("forward"):
                scores = self._graphs.run(forward, packed, space.stage.given, blocks, state)
            space.shown()
            return scores
        with self.timings.timed("draw"):
            space.show()
        with self.timings.timed("forward"):
            return self._forward(packed.to(self.model.device), blocks)

    def _shown_forward(self, packed: Pack, given: Tensor, blocks: int) -> Tensor:
        assert isinstance(self.space, LowRankSpace)
        self.space.show(given)
        return self._forward(packed, blocks)

    def _forward(self, packed: Pack, blocks: int) -> Tensor:
        self._shape.vocabulary = packed.vocabulary
        offsets = torch.arange(blocks, device=packed.kept.device).unsqueeze(1) * len(packed.tokens)
        scored = (offsets + packed.kept).flatten()
        trunk = self._trunk.carrying(packed, blocks, self.space.window)
        with attention.attending(packed), self._crown.scoring(scored), trunk as inputs:
            logits = self.model(**inputs, logits_to_keep=scored, use_cache=False).logits
        logits = logits.view(blocks, len(packed.kept), -1)
        place, column = packed.picked
        picked = logits[:, place, column]
        if packed.vocabulary is None:
            picked -= logits.logsumexp(-1)[:, place]
        return picked.float()

    def _read(self, scores: Tensor, packed: Pack) -> np.ndarray:
        """Log-likelihoods of candidates, float32 ``(blocks, candidates)``; a GPU is waited for."""
        return np.add.reduceat(scores.cpu().numpy(), packed.starts, axis=1)

    def _cost(self, row: Row, normalised: bool) -> int:
        """Tokens of a forward that this row is worth: its own, and what its logits take in memory."""
        if not normalised and row.single_token:
            return row.n_tokens
        config = self.model.config.get_text_config()
        scored = sum(len(candidate.scored) for candidate in row.candidates)
        return row.n_tokens + scored * config.vocab_size // (ACTIVATIONS * config.hidden_size)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[tuple[int, ...]]:
        """What the clean model writes on; see `zotune.runtimes.base.Runtime.generate`."""
        self.space.probe([CLEAN])
        self.space.show()
        return generation.generate(
            self.model,
            self._shape,
            prompts,
            max_new_tokens=max_new_tokens,
            stop=frozenset(stop),
            max_tokens=self.max_tokens,
        )

    @torch.inference_mode()
    def apply(self, update: Update) -> None:
        """Change the weights in factor space; fold at the end of a window."""
        with self.timings.timed("apply"):
            self.space.apply(update, self._weights, self._fold)

    def state(self) -> dict[str, Tensor]:
        """Tuned weights as last folded, accumulated update and rule state, as CPU tensors."""
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        weights = {f"weight/{site.name}": weight for site, weight in self._weights.items()}
        return weights | self.space.state() | self._fold.state()

    @torch.inference_mode()
    def load_state(self, state: Mapping[str, Tensor], window: int) -> None:
        """Restore what `state` returned while ``window`` was current.

        Raises:
            JournalError: The tensors are not those of this layout and method.
        """
        expected = {name: tensor.shape for name, tensor in self._tensors().items()}
        if expected != {name: tensor.shape for name, tensor in state.items()}:
            odd = sorted(set(expected) ^ set(state)) or [n for n in expected if expected[n] != state[n].shape]
            raise JournalError(f"the saved state does not fit this model and method: {odd[0]!r} differs")
        for site, weight in self._weights.items():
            weight.copy_(state[f"weight/{site.name}"])
        self._fold.load_state(state)
        self.space.load_state(dict(state), window)

    @torch.inference_mode()
    def export(self, path: Path, max_shard_size: str = "5GB") -> None:
        """Write the tuned model as an ordinary Hugging Face folder, in files of at most ``max_shard_size``."""
        self.model.save_pretrained(path, state_dict=self.tuned(), max_shard_size=max_shard_size)

    @torch.inference_mode()
    def tuned(self) -> dict[str, Tensor]:
        """The model's state dict with this window's update, or the LoRA matrices, merged into the weights."""
        merged = dict(self.model.state_dict())
        names: dict[int, list[str]] = {}
        for name, tensor in merged.items():
            names.setdefault(tensor.data_ptr(), []).append(name)
        for site, state in self.space.sites.items():
            weight = self._weights[site]
            tuned = (weight.float() * state.keep + state.change(slice(None))).to(weight.dtype)
            stored = tuned.T.contiguous() if merged[site.name].stride() != weight.stride() else tuned
            merged |= dict.fromkeys(names[weight.data_ptr()], stored)
        return merged if self.method.lora_rank is None else lora.merge(self.model, merged)

    def close(self) -> None:
        """Give the model back its own forwards and attention."""
        self._trunk.close()
        modules.unwrap(self.model)
        for each in self._siblings:
            each.close()
        self.model.set_attn_implementation(self._attention_before)


def twin(config: ModelConfig, method: Method, *, seed: int, fold: str) -> EmbeddedRuntime:
    """An embedded runtime on this process's CPU with the weights that a run began with, whatever runs it elsewhere."""
    model, _ = models.load(config.model_copy(update={"device": "cpu"}))
    return EmbeddedRuntime(model, method, seed=seed, fold=fold)
