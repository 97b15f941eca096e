from __future__ import annotations

import pytest
import torch

from zotune.bench import random_rows, shapes
from zotune.errors import ConfigError
from zotune.runtimes.sites import find_sites


@pytest.mark.parametrize(
    ("name", "billions"),
    [("opt-350m", 0.3312), ("opt-13b", 12.853), ("smollm2-135m", 0.1345), ("llama-3.1-8b", 8.030), ("qwen3-4b", 4.022)],
)
def test_shapes_have_the_parameters_of_the_models_that_they_are_named_after(name: str, billions: float) -> None:
    assert shapes.parameters(name) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_a_network_is_the_same_every_time_and_leaves_the_callers_stream_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, two = (shapes.network("tiny-qwen3", torch.float32, "cpu").state_dict() for _ in range(2))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_on_meta_every_site_is_found_and_matrices_take_no_memory() -> None:
    there, nowhere = (shapes.network("tiny-qwen3", torch.bfloat16, device) for device in ("cpu", "meta"))
    assert list(find_sites(nowhere, "all")) == list(find_sites(there, "all"))
    assert all(parameter.is_meta for parameter in nowhere.parameters() if parameter.dim() > 1)


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'opt-13b'"):
        shapes.network("opt-14b", torch.float32, "cpu")


def test_rows_are_as_long_as_those_of_sst2() -> None:
    data = random_rows.dataset(256)
    lengths = torch.tensor([len(example.row.prompt) for example in data.train], dtype=torch.float32)
    assert float(lengths.mean()) == pytest.approx(random_rows.MEAN, abs=0.5)
    assert random_rows.SHORTEST <= lengths.min() < 10
    assert 50 < lengths.max() <= random_rows.LONGEST
    assert {example.gold for example in data.train} == {0, 1}
    assert max(token for example in data.train for token in example.row.prompt) < 256
    assert not data.objective.normalised, "candidates of one token need no normaliser"
    assert data.train == random_rows.dataset(256).train
