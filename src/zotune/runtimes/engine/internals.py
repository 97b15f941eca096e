"""All that zotune knows of vLLM's inside: its worker, its layers, and how a forward is asked for.

vLLM loads the model as ever. Before it compiles, captures or profiles anything, every layer that holds a site is given
a wrapper that calls what was there and adds each token's perturbation (`zotune.runtimes.engine.tokenwise`). Scoring
bypasses requests: a hand-built output of the scheduler goes to the model runner, and the hidden states come back.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from zotune.errors import ModelError
from zotune.layout import Site
from zotune.runtimes.engine import layers, slots
from zotune.runtimes.engine.head import Head
from zotune.runtimes.engine.layers import LinearLayer, Place
from zotune.runtimes.engine.lifeline import follow
from zotune.runtimes.engine.tokens import Part
from zotune.runtimes.engine.tuner import Tuner
from zotune.runtimes.engine.worker_settings import Carried

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker  # type: ignore[assignment]

_ROWS_AT_ONCE = 4096


class Worker(_Worker):
    """vLLM's worker for this platform, with zotune's `Tuner` beside its model."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load as ever, then wrap the layers that hold sites."""
        carried = cast("Carried", self.vllm_config.additional_config)
        follow()
        super().load_model(*args, **kwargs)
        layers.number_from(carried.layers)
        self.tuner = Tuner(Engine(self.model_runner), carried.values)

    def zotune(self, method: str, *args: Any) -> Any:
        """Call one of the `Tuner`'s remote methods."""
        return self.tuner.call(method, *args)


class Engine:
    """What a `Tuner` asks of vLLM.

    Attributes:
        model: The loaded model.
        dtype: Of its activations.
        device: Where it is.
        max_tokens: Most tokens of a forward.
        max_rows: Most sequences of a forward.
        max_length: Most tokens of a sequence.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._calls = itertools.count()
        config = runner.vllm_config
        self.model: Any = runner.get_model()
        self.dtype: torch.dtype = config.model_config.dtype
        self.device = torch.device(runner.device)
        self.max_tokens: int = config.scheduler_config.max_num_batched_tokens
        self.max_rows: int = config.scheduler_config.max_num_seqs
        self.max_length: int = config.model_config.max_model_len

    @property
    def blocks(self) -> tuple[int, ...]:
        """Tokens of a block of each group of the key-value cache."""
        return tuple(group.kv_cache_spec.block_size for group in self._runner.kv_cache_config.kv_cache_groups)

    @property
    def n_blocks(self) -> int:
        """Blocks that a forward may use; the first is vLLM's own."""
        return int(self._runner.kv_cache_config.num_blocks) - 1

    def locate(self, sites: Sequence[Site]) -> list[Place]:
        """Where each site is.

        Raises:
            ModelError: The model stores a site in a way that is not known, or is not vLLM's own.
        """
        if ".models.transformers" in type(self.model).__module__:
            raise ModelError(
                "vLLM has no implementation of its own of this model: it would run transformers' code, which zotune "
                "does not tune in there. Set runtime.type = 'torch', which does."
            )
        modules = {path: _without_adapters(module) for path, module in self.model.named_modules()}
        fused = getattr(self.model, "packed_modules_mapping", None) or {}
        # Such an attention multiplies by parts of this layer's weight itself, past the layer and what wraps it.
        passed = [each.kv_b_proj for each in self.model.modules() if isinstance(each, MLAAttention)]
        modules = {path: each for path, each in modules.items() if all(each is not other for other in passed)}
        places = [_place(modules, fused, site) for site in sites]
        lost = [site.name for site, place in zip(sites, places, strict=True) if place is None]
        if lost:
            raise ModelError(
                f"in vLLM's {type(self.model).__name__}, {len(lost)} of {len(sites)} sites have no place that zotune "
                f"knows, among them {', '.join(lost[:3])}. Set runtime.type = 'torch', or method.scope = 'linear' if "
                "these are no linear layers."
            )
        return [place for place in places if place is not None]

    def head(self) -> Head:
        """The output head.

        Raises:
            ModelError: The model has none that is known.
        """
        text = self.model.get_language_model() if hasattr(self.model, "get_language_model") else self.model
        processors = [each for each in text.modules() if isinstance(each, LogitsProcessor)]
        module = getattr(text, "lm_head", None)
        if module is None and processors:
            module = _head_given_to(processors[0], text)
        if not isinstance(module, VocabParallelEmbedding) or len(processors) != 1:
            raise ModelError(f"vLLM's {type(self.model).__name__} has no output head that zotune knows")
        (processor,) = processors
        shard = module.shard_indices
        owned = slice(shard.org_vocab_start_index, shard.org_vocab_end_index)
        return Head(module, owned, processor.scale, processor.soft_cap)

    def forward(self, sequences: Sequence[list[int]], *, replay: bool = True) -> Tensor:
        """Hidden states after the last layer of these sequences, one after the other.

        Args:
            sequences: Token ids, ascending by length: vLLM puts shorter ones first by itself.
            replay: Whether a CUDA graph may stand for it; in one, layers do what they did when it was captured.

        Returns:
            ``(tokens, width)``, valid until the next forward.
        """
        runner, call = self._runner, next(self._calls)
        ids = [f"zotune-{call}-{i}" for i in range(len(sequences))]
        free = itertools.count(1)
        new = [
            _request(name, tokens, tuple([next(free) for _ in range(0, len(tokens), size)] for size in self.blocks))
            for name, tokens in zip(ids, sequences, strict=True)
        ]
        # Requests that a generation has ended with hold places of the newer runner until vLLM's next batch.
        left = set(runner.req_states.req_id_to_index) if hasattr(runner, "req_states") else set()
        with _without_logits(self.model), _graphs(runner, replay) as options:
            runner.execute_model(_schedule(new, left, len(self.blocks)), **options)
        state, runner.execute_model_state = runner.execute_model_state, None
        order = (getattr(state, "input_batch", None) or runner.input_batch).req_ids
        if list(order)[: len(ids)] != ids:
            raise RuntimeError("vLLM ran the rows of a batch in another order than they were given in")
        runner.execute_model(_schedule([], set(ids), len(self.blocks)))
        return state.hidden_states[: sum(map(len, sequences))]

    def quantisation(self, place: Place) -> str | None:
        """How a linear layer is quantised; None where it has a plain weight."""
        base = place.module.quant_method.base if place.kind == "linear" else None
        if base is None or isinstance(base, UnquantizedLinearMethod):
            return None
        return f"{self._runner.vllm_config.model_config.quantization}, {type(base).__name__}"

    def plain(self, place: Place) -> Tensor:
        """A parameter in plain form: vLLM's own tensor, or a copy where vLLM keeps it in another form.

        Args:
            place: Of a layer that is not quantised.
        """
        stored: Tensor = getattr(place.module, place.parameter).data
        if place.kind != "linear" or place.parameter == "bias":
            return stored
        # What was packed is read back exactly: every element is once one and otherwise zero times something.
        return stored if stored.numel() else _read_back(place.module.quant_method, self.dtype)

    def sample(self, place: Place, column: int | None) -> Tensor:
        """A column of a matrix, as the layer multiplies by it, or a vector; ``(rows,)``."""
        if place.kind == "linear" and column is not None:
            layer: LinearLayer = place.module.quant_method
            unit = torch.zeros(1, layer.shape[1], dtype=self.dtype, device=self.device)
            unit[0, column] = 1.0
            found: Tensor = layer.base.apply(layer.module, unit, None)[0]
            return found
        stored: Tensor = getattr(place.module, place.parameter).data
        return stored if column is None else stored[:, column]

    def repack(self, place: Place, weight: Tensor) -> None:
        """Take a parameter's new value, which may be vLLM's own tensor changed in place."""
        if place.parameter != "weight" or not current_platform.is_cpu() or place.kind == "norm":
            return
        sharing = [place.module]
        if place.kind == "linear":
            place.module.weight = nn.Parameter(weight, requires_grad=False)
        else:
            tables = [each for each in self.model.modules() if isinstance(each, VocabParallelEmbedding)]
            sharing = [each for each in tables if each.weight is place.module.weight]
        for module in sharing:
            module.quant_method.process_weights_after_loading(module)

    def open_slots(self, count: int, places: Sequence[Place]) -> None:
        """Make so many adapter slots, all empty, for the layers at these places.

        Raises:
            ModelError: vLLM has none for a layer.
        """
        self._slots = AdapterSlots(self._runner.lora_manager, count, places)

    def write_slot(self, number: int, place: Place, a: Tensor, b: Tensor) -> None:
        """Let a slot add ``x a^T b^T``, ``(r, in)`` and ``(out, r)``, at a place."""
        self._slots.write(number, place, a, b)


class AdapterSlots:
    """vLLM's LoRA slots, registered once from memory and then written where the layers read them.

    Args:
        manager: The worker's LoRA manager.
        count: How many.
        places: What they are to hold.

    Raises:
        ModelError: vLLM has no slot for a layer.
    """

    def __init__(self, manager: Any, count: int, places: Sequence[Place]) -> None:
        self._manager = manager._adapter_manager
        for number in range(count):
            request = slots.request(number)
            manager.add_dummy_lora(request, rank=1)
            manager.pin_adapter(request.lora_int_id)
        self._pieces = {place.part.site: self._piece(place) for place in places}

    def write(self, number: int, place: Place, a: Tensor, b: Tensor) -> None:
        """Let a slot add ``x a^T b^T``, ``(r, in)`` and ``(out, r)``, at a place."""
        module, piece = self._pieces[place.part.site]
        index = self._manager.lora_index_to_id.index(slots.request(number).lora_int_id)
        rank = len(a)
        into_a, into_b = module.lora_a_stacked[piece][index, 0], module.lora_b_stacked[piece][index, 0]
        into_a[:rank, : a.shape[1]] = a
        into_b[: len(b), :rank] = b

    def _piece(self, place: Place) -> tuple[Any, int]:
        """The layer of a place, and which of its matrices are the place's."""
        module, local = self._manager.modules.get(place.path), place.part.local
        if module is not None:
            stops = list(itertools.accumulate(module.output_slices))
            pieces = list(zip([0, *stops], stops, strict=False))
            if (local.start, local.stop) in pieces:
                return module, pieces.index((local.start, local.stop))
        raise ModelError(
            f"vLLM has no adapter slot for {place.part.site.name}; set runtime.vllm.adapters = 'none', which generates "
            "from one state at a time"
        )


def _without_adapters(module: nn.Module) -> Any:
    return module.base_layer if isinstance(module, BaseLayerWithLoRA) else module


def _read_back(layer: LinearLayer, dtype: torch.dtype) -> Tensor:
    parts = torch.eye(layer.shape[1], dtype=dtype).split(_ROWS_AT_ONCE)
    return torch.cat([layer.base.apply(layer.module, part, None) for part in parts]).T.contiguous()


def _place(modules: dict[str, nn.Module], fused: dict[str, list[str]], site: Site) -> Place | None:
    """Where a site is; None where its module is not one of those that are known."""
    path, _, parameter = site.name.rpartition(".")
    parent, _, own = path.rpartition(".")
    if path in modules:
        return _found(path, modules[path], parameter, site, None)
    for name, parts in fused.items():
        whole = f"{parent}.{name}"
        if own in parts and whole in modules:
            return _found(whole, modules[whole], parameter, site, parts.index(own))
    return None


def _found(path: str, module: nn.Module, parameter: str, site: Site, shard: int | None) -> Place | None:
    if isinstance(module, VocabParallelEmbedding):
        owned = module.shard_indices
        rows = slice(owned.org_vocab_start_index, owned.org_vocab_end_index)
        # Fused look-ups of a sharded table would pass the wrapper by.
        module.use_fused_embedding = False
        return Place(path, module, parameter, "table", Part(site, slice(0, rows.stop - rows.start), rows))
    if isinstance(module, RowParallelLinear):
        width = module.input_size_per_partition
        columns = slice(module.tp_rank * width, (module.tp_rank + 1) * width)
        part = Part(site, slice(0, site.shape[0]), slice(None), columns if site.is_matrix else slice(None))
        return Place(path, module, parameter, "linear", part)
    if isinstance(module, LinearBase):
        return Place(path, module, parameter, "linear", Part(site, *_output_rows(module, shard)))
    stored = getattr(module, parameter, None)
    if stored is None or tuple(stored.shape) != site.shape:
        return None
    kind = "table" if isinstance(module, nn.Embedding) else "norm"
    return Place(path, module, parameter, kind, Part(site, slice(0, site.shape[0]), slice(None)))


def _output_rows(module: LinearBase, shard: int | None) -> tuple[slice, slice | Tensor]:
    """Rows of a module's own weight, and of the site's, that a shard of a fused layer or a whole layer has here."""
    if not isinstance(module, ColumnParallelLinear):
        return slice(0, module.output_size), slice(0, module.output_size)
    local, rows = _pieces(module)
    shard = 0 if len(rows) == 1 else shard
    if shard is not None:
        at = sum(part.stop - part.start for part in rows[:shard])
        return slice(at, at + rows[shard].stop - rows[shard].start), rows[shard]
    # One site over all pieces, as in GPT-2: its rows are the pieces' one after the other.
    starts = [0, *itertools.accumulate(local)]
    index = [torch.arange(piece.start, piece.stop) + start for piece, start in zip(rows, starts, strict=False)]
    together = torch.cat(index)
    return slice(0, len(together)), together


def _pieces(module: Any) -> tuple[list[int], list[slice]]:
    """Full size of every piece of a column-parallel layer, and which of its rows are here."""
    rank, size = module.tp_rank, module.tp_size
    if isinstance(module, QKVParallelLinear):
        kv_rank, kv_heads = rank // module.num_kv_head_replicas, module.total_num_kv_heads
        sizes = [module.total_num_heads * module.head_size, kv_heads * module.head_size, kv_heads * module.v_head_size]
        widths = [module.num_heads * module.head_size, module.num_kv_heads * module.head_size]
        widths.append(module.num_kv_heads * module.v_head_size)
        ranks = [rank, kv_rank, kv_rank]
    else:
        sizes = list(module.output_sizes) if isinstance(module, MergedColumnParallelLinear) else [module.output_size]
        widths, ranks = [full // size for full in sizes], [rank] * len(sizes)
    return sizes, [slice(at * width, (at + 1) * width) for at, width in zip(ranks, widths, strict=True)]


_SAMPLING = SamplingParams(temperature=0.0, max_tokens=1)


def _request(name: str, tokens: list[int], blocks: tuple[list[int], ...]) -> NewRequestData:
    return NewRequestData(
        req_id=name,
        prompt_token_ids=tokens,
        mm_features=[],
        sampling_params=_SAMPLING,
        pooling_params=None,
        block_ids=blocks,
        num_computed_tokens=0,
        lora_request=None,
        prefill_token_ids=tokens,
    )


def _schedule(new: Sequence[NewRequestData], finished: set[str], groups: int) -> SchedulerOutput:
    scheduled = {each.req_id: len(each.prompt_token_ids or ()) for each in new}
    known = {field.name for field in fields(SchedulerOutput)}
    values: dict[str, Any] = {
        "scheduled_new_reqs": list(new),
        "scheduled_cached_reqs": CachedRequestData.make_empty(),
        "num_scheduled_tokens": scheduled,
        "total_num_scheduled_tokens": sum(scheduled.values()),
        "scheduled_spec_decode_tokens": {},
        "scheduled_encoder_inputs": {},
        # Older versions look for prefixes that requests share; here each has its own blocks.
        "num_common_prefix_blocks": [0] * groups,
        "finished_req_ids": finished,
        "free_encoder_mm_hashes": [],
    }
    return SchedulerOutput(**{name: value for name, value in values.items() if name in known})


def _head_given_to(processor: Any, model: Any) -> Any:
    """What a model scores with, where that has no name of its own: Gemma 2 takes its embeddings."""
    given: list[Any] = []

    def take(head: Any, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        given.append(head)
        return hidden

    processor.forward = take
    try:
        model.compute_logits(torch.empty(0, 0))
    finally:
        del processor.forward
    return next(iter(given), None)


@contextmanager
def _without_logits(model: Any) -> Iterator[None]:
    """Keep a runner that would score the whole vocabulary for every row from doing so."""
    before = model.__dict__.get("compute_logits")
    model.compute_logits = lambda hidden, *args, **kwargs: hidden.new_empty(len(hidden), 0)
    try:
        yield
    finally:
        del model.compute_logits
        if before is not None:
            model.compute_logits = before


@contextmanager
def _graphs(runner: Any, replay: bool) -> Iterator[dict[str, Any]]:
    """Let a runner replay CUDA graphs, or keep it from that; what a forward is to be asked with."""
    if replay or "is_profile" in inspect.signature(runner.execute_model).parameters:
        yield {} if replay else {"is_profile": True}
        return
    # The first runner has no such argument. It runs without graphs as long as it has none to choose from.
    dispatcher = runner.cudagraph_dispatcher
    before, dispatcher.keys_initialized = dispatcher.keys_initialized, False
    try:
        yield {}
    finally:
        dispatcher.keys_initialized = before
