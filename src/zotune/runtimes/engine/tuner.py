"""The worker's side of the vLLM runtime: it owns the space and the weights, and turns probes and rows into scores.

It knows nothing of vLLM but `Engine`. What it takes and gives is plain data, because it may have to cross a process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zotune.errors import ModelError, reason
from zotune.layout import Site
from zotune.optimizer import Method
from zotune.protocol import Probe
from zotune.runtimes import precision, wire
from zotune.runtimes.engine import lora, shards, worker_settings
from zotune.runtimes.engine.bank import Bank
from zotune.runtimes.engine.batch import Batch, Prepared
from zotune.runtimes.engine.densewise import DrawnSpace
from zotune.runtimes.engine.head import Head
from zotune.runtimes.engine.layers import Layer, NormLayer, Place, Space, Table, TableLayer, wrap
from zotune.runtimes.engine.tokens import TokenMix
from zotune.runtimes.engine.tokenwise import TokenSpace
from zotune.runtimes.engine.weights import Weights
from zotune.runtimes.folding.fold import StochasticFold
from zotune.runtimes.packing import ACTIVATIONS, cut
from zotune.runtimes.spaces.lowrank import LowRankMatrix
from zotune.runtimes.spaces.mixture import grouped
from zotune.runtimes.timings import Timings

if TYPE_CHECKING:
    from zotune.runtimes.engine.internals import Engine

MOST_DIRECTIONS = 16
"""Of one forward, where they are thin; see `directions_at_once`."""

_SAMPLES = 64


class Tuner:
    """Tunes the model of one worker.

    Args:
        engine: What runs the model.
        settings: What `zotune.runtimes.engine.worker_settings.pack` wrote.

    Raises:
        ModelError: A site has no place in the engine's model that is known, or no weight to fold into.
    """

    def __init__(self, engine: Engine, settings: Mapping[str, Any]) -> None:
        self.engine, self.method = engine, Method(**settings["method"])
        self._seed, self._fold = settings["seed"], settings["fold"]
        sites = [worker_settings.site(each) for each in settings["sites"]]
        self.places = self._located(sites)
        self.mix = TokenMix(engine.max_tokens, directions_at_once(self.method), engine.dtype, engine.device)
        kind = TokenSpace if self.method.family == "low-rank" else DrawnSpace
        self.space: Space = kind(sites, self.method, self._seed, self.mix)
        self.layers: list[Layer] = wrap(self.places, self.space)
        self.space.attach([tuned for layer in self.layers for tuned in layer.tuned])
        self.head = engine.head()
        self._table = _table_of(self.head, self.layers)
        if self._table is not None and all(layer.module is not self.head.module for layer in self.layers):
            # Tied by sharing the embedding's weight, in a module of its own.
            tied = TableLayer("the output head", self.head.module)
            tied.weight = self._table
            tied.wrap()
        self._weights: Weights | None = None
        self._bank = self._banked(settings["bank_rank"])
        self._rows: dict[int, Prepared] = {}
        self._loading: dict[str, Tensor] = {}
        self._plain = False
        self.timings = Timings.of("draw", "pack", "forward", "head", "apply", "fold")

    @property
    def weights(self) -> Weights:
        """The tuned weights; read back from the engine the first time that they are needed."""
        if self._weights is None:
            plain = [place for place in self.places if self.engine.quantisation(place) is None]
            self._weights = Weights(plain, self.engine.plain, self.engine.repack, self._seed, self._fold)
        return self._weights

    def _located(self, sites: Sequence[Site]) -> list[Place]:
        """Where each site is; LoRA matrices are made."""
        if self.method.lora_rank is None:
            return self.engine.locate(sites)
        bases = lora.bases(sites)
        places = dict(zip(bases, self.engine.locate(list(bases.values())), strict=True))
        return lora.beside(places, sites, self.engine.dtype, self.engine.device)

    def _banked(self, budget: int) -> Bank | None:
        """The update bank, if there is to be one."""
        found = {place.part.site: self.engine.quantisation(place) for place in self.places}
        fixed = {site: how for site, how in found.items() if how is not None}
        if not isinstance(self.space, TokenSpace):
            way = "Use a low-rank preset, such as lozo."
        elif budget:
            return Bank(self.space, budget, fixed, lambda: self.weights)
        else:
            way = (
                f"Set runtime.vllm.bank_rank, for example to {32 * self.method.rank}: the update bank keeps them "
                "beside the weight."
            )
        for site, how in fixed.items():
            raise ModelError(
                f"{site.name} is quantised ({how}), as are {len(fixed) - 1} more of {len(found)} sites, so there is no "
                f"weight to put updates into. {way}"
            )
        return None

    def call(self, method: str, *args: Any) -> Any:
        """Call one of the methods ``on_...``, which are the driver's."""
        with torch.inference_mode():
            return getattr(self, f"on_{method}")(*args)

    def on_begin(self, name: str, tensor: Any) -> None:
        """Take what a LoRA matrix is to begin with, whole."""
        for place in self.places:
            if place.part.site.name == name:
                stored: Tensor = getattr(place.module, place.parameter)
                stored.copy_(shards.take(wire.tensor(tensor), place.part.rows, place.part.columns))

    def on_rows(self, rows: Mapping[Any, Any]) -> None:
        """Take rows to score later, by number.

        Raises:
            ModelError: A row has a sequence that is longer than the engine was started for.
        """
        prepared = {int(number): Prepared.of(wire.row(each)) for number, each in rows.items()}
        longest = max(len(tokens) for row in prepared.values() for tokens in row.sequences)
        if longest > self.engine.max_length:
            raise ModelError(
                f"a row has {longest} tokens, and the engine was started for {self.engine.max_length}. "
                "Start it for longer rows, or set data.max_length."
            )
        self._rows |= prepared

    def on_score(self, probes: Sequence[Any], numbers: Sequence[int], normalised: bool) -> tuple[bytes, bytes]:
        """Score rows under probes.

        Returns:
            Logits of every scored token, in the order of rows, candidates and tokens, and the logarithms of what
            normalises them: float32 ``(probes, scored tokens)`` each. Logits of tokens that another shard of the
            vocabulary owns are 0. The normalisers are empty where they are not asked for or cancel.
        """
        rows = [self._rows[number] for number in numbers]
        asked = [wire.probe(each) for each in probes]
        whole = normalised or not all(row.single_token for row in rows)
        costs = [self._cost(row, whole) for row in rows]
        if (most := max(self._cost(row, whole=False) for row in rows)) > self.engine.max_tokens:
            raise ModelError(
                f"a row needs a forward of {most} tokens, and the engine was started for "
                f"{self.engine.max_tokens}. Start it for longer rows, or set data.max_length."
            )
        limit = max(1, self.engine.max_tokens // max(costs))
        parts = [self._score(group, rows, costs, whole) for group in grouped(asked, limit, self.mix.columns - 1)]
        logits, normalisers = (np.concatenate(each) for each in zip(*parts, strict=True))
        return logits.tobytes(), normalisers.tobytes()

    def _score(
        self, probes: Sequence[Probe], rows: Sequence[Prepared], costs: Sequence[int], whole: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        with self.timings.timed("draw"):
            self.space.probe(probes)
            numbers = self.mix.numbers(probes)
        parts = [
            self._forward(rows[part], numbers, whole) for part in cut(costs, self.engine.max_tokens // len(probes))
        ]
        logits, normalisers = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
        return logits, normalisers

    def _forward(self, rows: Sequence[Prepared], numbers: Tensor, whole: bool) -> tuple[np.ndarray, np.ndarray]:
        with self.timings.timed("pack"):
            batch = Batch.of(rows, len(numbers))
            state = torch.from_numpy(batch.states).to(numbers.device)
            self.mix.show(numbers[state])
        try:
            with self.timings.timed("forward"):
                hidden = self.engine.forward(batch.sequences, replay=not self._plain)
        finally:
            self.mix.clear(len(state))
        with self.timings.timed("head"):
            return self._read(hidden, batch, numbers, whole)

    def _read(self, hidden: Tensor, batch: Batch, numbers: Tensor, whole: bool) -> tuple[np.ndarray, np.ndarray]:
        """Logits and normalisers of what the batch scores, under the mixtures of these numbers."""
        probes = len(numbers)
        kept = hidden[torch.from_numpy(batch.kept.ravel()).to(hidden.device)].float()
        mix = self.mix.mixtures[numbers].repeat_interleave(batch.kept.shape[1], dim=0)
        start, stop = self.head.owned.start, self.head.owned.stop
        owned = (batch.tokens >= start) & (batch.tokens < stop)
        local = batch.tokens[owned] - start
        vocabulary, column = (None, local) if whole else np.unique(local, return_inverse=True)
        wanted = None if vocabulary is None else torch.from_numpy(vocabulary).to(hidden.device)
        logits = self.head.logits(kept, mix, self._table, wanted).view(probes, batch.kept.shape[1], -1)
        picked = np.zeros((probes, len(batch.tokens)), dtype=np.float32)
        picked[:, owned] = logits[:, torch.from_numpy(batch.place[owned]), torch.from_numpy(column)].cpu().numpy()
        if not whole:
            return picked, np.zeros((probes, 0), dtype=np.float32)
        return picked, logits.logsumexp(-1)[:, torch.from_numpy(batch.place)].cpu().numpy()

    def _cost(self, row: Prepared, whole: bool) -> int:
        """Tokens of a forward that a row is worth: its own, its share of sequences and blocks, and of logits."""
        engine = self.engine
        blocks = sum(-(-len(tokens) // size) for tokens in row.sequences for size in engine.blocks)
        shares = [len(row.sequences) / engine.max_rows, blocks / engine.n_blocks]
        cost = max(row.n_tokens, *(-(-int(engine.max_tokens * share * 1024) // 1024) + 1 for share in shares))
        if not whole:
            return cost
        owned, width = self.head.owned, self.head.module.weight.shape[1]
        return cost + len(row.kept) * (owned.stop - owned.start) // (ACTIVATIONS * width)

    def on_apply(self, update: Any) -> tuple[int, int]:
        """Change the weights; how often the update bank has been cut so far, and which window it is now."""
        given = wire.update(update)
        folds = self.space.goes_into_weights(given)
        with self.timings.timed("fold" if folds else "apply"):
            if not folds:
                self.space.apply(given, {}, StochasticFold(self._seed))
            elif self._bank is not None:
                self._bank.apply(given)
            else:
                self.weights.apply(self.space, given)
        return 0 if self._bank is None else len(self._bank.errors), self.space.window

    def on_state_names(self) -> list[str]:
        """Names of the tensors of a checkpoint."""
        return list(self._state())

    def on_tensor(self, name: str) -> tuple[Any, Any]:
        """A tensor of the state that is here, and which rows and columns of the whole it is (None: all of it)."""
        part = self.weights.part_of(name)
        return wire.pack_tensor(self._state()[name]), part and shards.pack(part)

    def _state(self) -> dict[str, Tensor]:
        return self.weights.state() | self.space.state() | (self._bank.state() if self._bank is not None else {})

    def on_load(self, name: str, tensor: Any) -> None:
        """Take a whole tensor of a state; `on_loaded` makes use of them."""
        self._loading[name] = wire.tensor(tensor)

    def on_loaded(self, window: int) -> None:
        """Restore the state that was sent, as of ``window``."""
        state, self._loading = self._loading, {}
        self.weights.load_state(state)
        if self._bank is not None:
            self._bank.load_state(state)
        self.space.load_state(state, window)

    def on_bank(self) -> dict[str, Any] | None:
        """How full the update bank is and what recompression has cost; None where there is none."""
        return None if self._bank is None else self._bank.about()

    def on_open_slots(self, count: int) -> None:
        """Make adapter slots."""
        self.engine.open_slots(count, self.places)

    def on_write_slot(self, number: int, probe: Any) -> None:
        """Let an adapter slot show a probe."""
        assert isinstance(self.space, TokenSpace)
        shift = self.space.shift(wire.probe(probe))
        for place in self.places:
            part, state = place.part, self.space.sites[place.part.site]
            if isinstance(state, LowRankMatrix):
                self.engine.write_slot(number, place, state.v[part.columns].T, part.of(shift[part.site]))

    def on_plain(self, plain: bool) -> None:
        """Whether wrapped layers do only what was there before."""
        self._plain = plain
        for layer in self.layers:
            layer.plain = plain

    def on_samples(self) -> dict[str, tuple[Any, Any, int | None]]:
        """Some elements of every site: a column's beginning of a matrix, and which; or a vector's beginning.

        Also of the weights that LoRA matrices stand beside: their order is that of the matrices' outputs.
        """
        beside = [place.base for place in self.places if place.base is not None]
        return {place.part.site.name: self._sample(place) for place in (*self.places, *beside)}

    def _sample(self, place: Place) -> tuple[Any, Any, int | None]:
        column = min(1, place.part.site.shape[1] - 1) if place.part.site.is_matrix else None
        try:
            sample = self.engine.sample(place, column)[place.part.local][:_SAMPLES]
        # What is missing of a build of vLLM shows when a layer is first used.
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            dtype = precision.name(self.engine.dtype)
            raise ModelError(
                f"the layer of {place.part.site.name!r} cannot run here in {dtype}, for vLLM has no kernel "
                f"for it on this kind of processor: {reason(error)}. Use another model.dtype, a checkpoint in another "
                "format, or another machine."
            ) from error
        return wire.pack_tensor(sample), shards.pack(place.part), column

    def on_missed(self) -> list[str]:
        """Paths of wrapped layers that no forward has called, or whose tuning no forward heeds."""
        tokens = list(range(3, 9))
        # A copy, because a CUDA graph writes the next forward's result where this one's is.
        before = self.engine.forward([tokens]).clone()
        return [layer.path for layer in self.layers if not self._heeded(layer, tokens, before)]

    def _heeded(self, layer: Layer, tokens: list[int], before: Tensor) -> bool:
        if not isinstance(layer, NormLayer):
            # The head is read here and not by vLLM.
            return layer.calls > 0 or layer.module is self.head.module
        # A compiler has taken the layer's code apart, so it cannot count; what it does can be seen.
        phis = [each.phi for each in layer.tuned]
        kept = [phi[0].clone() for phi in phis]
        for phi in phis:
            phi[0] += torch.linspace(-1, 1, len(phi[0]), device=phi.device)
        after = self.engine.forward([tokens])
        for phi, value in zip(phis, kept, strict=True):
            phi[0] = value
        return not torch.equal(before, after)

    def on_timings(self) -> dict[str, float]:
        """Seconds spent so far, by phase."""
        return dict(self.timings)


def directions_at_once(method: Method) -> int:
    """Most directions of a forward; more are scored in several.

    A forward multiplies every token by every direction in it, and then takes what the token sees. Where a direction is
    as large as the weights, that would cost more than a forward for each.
    """
    as_large = method.family == "dense" and method.lora_rank is None
    return 1 if as_large else min(method.directions, MOST_DIRECTIONS)


def _table_of(head: Head, layers: Sequence[Layer]) -> Table | None:
    """What tunes the output head: its own site, or that of the embedding that it is tied to."""
    for layer in layers:
        if isinstance(layer, TableLayer) and layer.module.weight is head.module.weight:
            return layer.weight
    return None
