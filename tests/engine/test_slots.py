"""Adapter slots: every slot answers as the embedded runtime's probe does, whatever the prefix cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from engines import HEAD_SIZE, engines

from zotune.config import EngineConfig, RuntimeConfig
from zotune.errors import ConfigError
from zotune.layout import Layout
from zotune.optimizer import Method
from zotune.protocol import CLEAN, DirectionKey, Probe, Update
from zotune.rows import Candidate, Row
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.engine import slots, worker_settings
from zotune.runtimes.engine.slots import COUNT
from zotune.testing import tiny

METHOD = Method(scope="linear", eps=0.1, interval=4)
WRITTEN = 6
EPS = 0.15
# The first is longer than a block of the key-value cache, so that its beginning is cached.
PROMPTS = [tuple(range(4 + at, 4 + at + length)) for at, length in ((0, 50), (30, 5), (7, 17))]
EVERY_TOKEN = tuple(Candidate((token,), (0,)) for token in range(tiny.VOCABULARY))


@dataclass
class Pair:
    """An engine with slots, and the embedded runtime of the same model, method and seed."""

    engine: Any
    embedded: EmbeddedRuntime
    step: int = 0

    def probe(self, index: int = 0, sign: int = 1) -> Probe:
        """One of the directions of the current step."""
        return Probe(DirectionKey(self.engine.window, self.step, index), sign, EPS)

    def update(self, coefficient: float = 60.0) -> None:
        """Move both along a direction of the current step, and go on to the next one."""
        terms = ((self.probe().key, coefficient),)
        closes = self.step % METHOD.interval == METHOD.interval - 1
        update = Update(self.step, self.engine.window, terms, 1e-3, closes)
        self.engine.apply(update)
        self.embedded.apply(update)
        self.step += 1

    def expected(self, probe: Probe) -> list[tuple[int, ...]]:
        """What a probe's model writes on from every prompt: the likeliest token of its scores, one after the other."""
        written: list[tuple[int, ...]] = [()] * len(PROMPTS)
        for _ in range(WRITTEN):
            rows = [Row(prompt + end, EVERY_TOKEN) for prompt, end in zip(PROMPTS, written, strict=True)]
            best = self.embedded.score([probe], rows).reshape(len(rows), -1).argmax(1)
            written = [(*end, int(token)) for end, token in zip(written, best, strict=True)]
        return written

    def answers(self, slots: Sequence[int]) -> list[list[tuple[int, ...]]]:
        """What slots write on."""
        answers: list[list[tuple[int, ...]]] = self.engine.slots.generate(PROMPTS, slots, max_new_tokens=WRITTEN)
        return answers


@contextmanager
def pairs(family: str, **options: Any) -> Iterator[Pair]:
    """A pair around a tiny model."""
    with engines(adapters="lora", **options) as start:
        made = [tiny.model(family, head_size=HEAD_SIZE) for _ in range(2)]
        yield Pair(start(made[0], METHOD, seed=3), EmbeddedRuntime(made[1], METHOD, seed=3))


def _check_states(pair: Pair) -> None:
    pair.update()
    probes = [pair.probe(), pair.probe(sign=-1), CLEAN, pair.probe(index=1)]
    for slot, probe in enumerate(probes):
        pair.engine.slots.write(slot, probe)
    # The last slot was never written, and shows the clean model.
    answers = pair.answers([*range(len(probes)), COUNT - 1])
    expected = [pair.expected(probe) for probe in probes]
    assert answers == [*expected, expected[probes.index(CLEAN)]]
    assert len({tuple(each) for each in expected}) == len(probes)


# One process holds one engine at a time: these come before the module's own.


def test_states_of_another_family() -> None:
    with pairs("opt") as made:
        _check_states(made)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"own_process": True}, {"tensor_parallel": 2}, {"compile": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_states_in_other_engines(family: str, options: dict[str, Any]) -> None:
    with pairs(family, **options) as made:
        _check_states(made)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with pairs("llama") as made:
        yield made


def _check_follows(pair: Pair, probe: Probe) -> None:
    assert pair.answers([0]) == [pair.expected(probe)]
    written = pair.engine.generate(PROMPTS, max_new_tokens=WRITTEN)
    assert written == pair.expected(CLEAN) == pair.embedded.generate(PROMPTS, max_new_tokens=WRITTEN)


# The first test, because the first requests are given the first blocks of the cache, which scoring uses, too.
def test_scoring_does_not_spoil_what_is_cached(pair: Pair) -> None:
    probe = pair.probe()
    pair.engine.slots.write(0, probe)
    _check_follows(pair, probe)
    pair.engine.score([probe, CLEAN], [Row(prompt[::-1], EVERY_TOKEN) for prompt in PROMPTS * 2])
    _check_follows(pair, probe)


def test_all_states_answer_in_one_batch(pair: Pair) -> None:
    _check_states(pair)


def test_a_rewritten_slot_never_answers_from_what_is_cached(pair: Pair) -> None:
    pair.engine.slots.write(1, pair.probe(index=1))
    for probe in (pair.probe(), pair.probe(sign=-1), CLEAN, pair.probe()):
        pair.engine.slots.write(0, probe)
        assert pair.answers([0]) == [pair.expected(probe)]
    assert pair.answers([1]) == [pair.expected(pair.probe(index=1))]


def test_prefixes_of_an_unchanged_slot_are_cached(pair: Pair) -> None:
    pair.engine.slots.write(0, pair.probe())
    core = pair.engine.llm.llm_engine.engine_core.engine_core
    pair.answers([0])
    known = len(core.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)
    pair.answers([0])
    assert len(core.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block) == known > 0
    pair.engine.slots.write(0, pair.probe(sign=-1))
    pair.answers([0])
    assert len(core.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block) > known


def test_slots_and_the_clean_model_follow_updates(pair: Pair) -> None:
    probe = pair.probe()
    pair.engine.slots.write(0, probe)
    for _ in range(2):
        _check_follows(pair, probe)
        pair.update()


def test_requests_without_a_slot_share_a_batch_with_slots(pair: Pair) -> None:
    from vllm import SamplingParams

    from zotune.runtimes.engine.slots import request

    for slot in range(COUNT):
        pair.engine.slots.write(slot, pair.probe())
    asked = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]
    options = SamplingParams(temperature=0.0, max_tokens=WRITTEN, ignore_eos=True, detokenize=False)
    adapters = [None, request(0), None]
    pair.engine.llm.reset_prefix_cache()
    answers = pair.engine.llm.generate(asked, options, lora_request=adapters, use_tqdm=False)
    clean, moved = pair.expected(CLEAN), pair.expected(pair.probe())
    assert [tuple(answer.outputs[0].token_ids) for answer in answers] == [clean[0], moved[1], clean[2]]


def test_directions_of_an_ended_window_are_refused(pair: Pair) -> None:
    old = pair.probe()
    pair.engine.slots.write(0, old)
    while pair.engine.window == old.key.window:  # type: ignore[union-attr]
        pair.update()
    with pytest.raises(ValueError, match=r"write or clear slot 0"):
        pair.answers([0])
    with pytest.raises(ValueError, match=r"slot 2 cannot take it"):
        pair.engine.slots.write(2, old)
    pair.engine.slots.clear(0)
    assert pair.answers([0]) == [pair.expected(CLEAN)]


def test_slots_that_are_not_there(pair: Pair) -> None:
    with pytest.raises(ValueError, match=f"no slot {COUNT}; the engine has the slots 0 to {COUNT - 1}"):
        pair.engine.slots.write(COUNT, CLEAN)
    with pytest.raises(ValueError, match="no slot -1"):
        pair.answers([-1])


def test_a_gpu_s_slots_take_16_bits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = RuntimeConfig(type="vllm", vllm=EngineConfig(adapters="lora"))
    settings = worker_settings.pack(Method(scope="linear"), Layout(()), 0, wanted)
    assert slots.options(settings, torch.float32)["enable_lora"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert slots.options(settings, torch.bfloat16)["enable_lora"]
    with pytest.raises(ConfigError, match=r"no model in float32 on a GPU.*model\.dtype = 'bfloat16'"):
        slots.options(settings, torch.float32)


@pytest.mark.parametrize(
    ("method", "said"), [(Method(scope="all"), "got 'all'"), (Method(scope="linear", rank=600), "got 600")]
)
def test_what_slots_cannot_hold_is_refused_before_the_engine_starts(method: Method, said: str) -> None:
    with engines(adapters="lora") as start, pytest.raises(ConfigError, match=said):
        start(tiny.model("llama", head_size=HEAD_SIZE), method)
