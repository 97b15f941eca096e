"""The feed-forward part of the last layer runs on scored tokens alone."""

import pytest
import torch
from torch import Tensor, nn

from zotune.optimizer import Method
from zotune.protocol import CLEAN, DirectionKey, Probe
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.runtimes.embedded.crown import Crown
from zotune.runtimes.embedded.modules import Shape
from zotune.runtimes.sites import decoder_layers
from zotune.testing import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

PROBES = [CLEAN, *(Probe(DirectionKey(0, 0, index), 1, 0.1) for index in range(2))]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_only_scored_tokens_reach_the_last_feed_forward(family: str, kind: str) -> None:
    runtime = EmbeddedRuntime(tiny.model(family), Method())
    seen: list[int] = []
    below, above = (layer.mlp for layer in decoder_layers(runtime.model))
    for module in (below, above):
        inner = next(each for each in module.modules() if each is not module and hasattr(each, "weight"))
        inner.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    rows = tiny.rows(kind, 5, seed=2)
    runtime.score(PROBES, rows)
    kept = {
        (at, candidate.tokens[:place])
        for at, row in enumerate(rows)
        for candidate in row.candidates
        for place in candidate.scored
    }
    assert seen[1] == len(PROBES) * len(kept)
    assert seen[0] > seen[1]


class Mixing(nn.Module):
    """Looks like a feed-forward module, and lets tokens see each other."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x.mean(1, keepdim=True)


def test_what_mixes_tokens_or_has_another_width_is_left_alone() -> None:
    model = tiny.model("llama")
    layer = decoder_layers(model)[-1]
    for other in (Mixing(nn.Linear(32, 32)), nn.Sequential(nn.Linear(32, 16))):
        layer.mlp = other
        Crown(model, Shape())
        assert not any("forward" in child.__dict__ for child in layer.children())
    layer.mlp = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    Crown(model, Shape())
    assert [name for name, child in layer.named_children() if "forward" in child.__dict__] == ["mlp"]


def test_a_forward_that_scores_nothing_in_particular_is_the_models_own() -> None:
    plain, tokens = tiny.model("llama"), torch.tensor([[5, 9, 11, 40, 7]])
    expected = plain(tokens).logits
    Crown(plain, Shape())
    assert torch.equal(plain(tokens).logits, expected)
