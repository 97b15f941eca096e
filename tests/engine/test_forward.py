"""A forward that zotune asks of a runner of GPUs; a runner of the same manners stands for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from zotune.runtimes.engine.internals import Engine

BLOCK, BLOCKS, WIDTH = 4, 100, 3


class Runner:
    """Keeps a request in one of its places until it is told that the request is over.

    Attributes:
        req_states: Which requests hold places.
        seen: The batches that it ran.
    """

    def __init__(self, places: int) -> None:
        self.device, self.places = torch.device("cpu"), places
        group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=BLOCK))
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[group, group], num_blocks=BLOCKS)
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(dtype=torch.float32, max_model_len=16),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=places),
        )
        self.req_states = SimpleNamespace(req_id_to_index={})
        self.execute_model_state: Any = None
        self.seen: list[Any] = []

    def get_model(self) -> nn.Module:
        return nn.Identity()

    def execute_model(self, scheduler_output: Any, is_profile: bool = False) -> None:
        held = self.req_states.req_id_to_index
        for name in scheduler_output.finished_req_ids:
            held.pop(name, None)
        for each in scheduler_output.scheduled_new_reqs:
            assert len(held) < self.places, "No free indices"
            held[each.req_id] = len(held)
        if scheduler_output.total_num_scheduled_tokens:
            self.seen.append(scheduler_output)
            names = sorted(scheduler_output.num_scheduled_tokens, key=scheduler_output.num_scheduled_tokens.__getitem__)
            states = torch.zeros(scheduler_output.total_num_scheduled_tokens + 8, WIDTH)
            batch = SimpleNamespace(req_ids=names)
            self.execute_model_state = SimpleNamespace(hidden_states=states, input_batch=batch)


def test_requests_that_are_over_hold_no_place_that_a_row_needs() -> None:
    runner = Runner(places=4)
    # vLLM tells that these are over with its next batch, and there is none before the rows of a step.
    runner.req_states.req_id_to_index |= {"over": 0, "over, too": 1}
    engine = Engine(runner)
    for _ in range(2):
        assert engine.forward([[1], [2], [3, 4], [5, 6, 7]]).shape == (7, WIDTH)
        assert not runner.req_states.req_id_to_index


def test_no_two_rows_share_a_block_and_none_has_vllm_s_own() -> None:
    runner = Runner(places=4)
    engine = Engine(runner)
    engine.forward([[1], [1] * BLOCK, [1] * (BLOCK + 1)])
    rows = [each.block_ids for each in runner.seen[0].scheduled_new_reqs]
    assert [[len(group) for group in row] for row in rows] == [[1, 1], [1, 1], [2, 2]]
    given = [block for row in rows for group in row for block in group]
    assert len(set(given)) == len(given)
    assert min(given) == 1
    assert max(given) <= engine.n_blocks
