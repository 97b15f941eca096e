"""Which sites of a model are worth tuning with forward passes: where the examples' gradients agree.

    python benchmarks/search/agreement.py --rows 400 --data data/sst2

Along a direction D of unit variance a zeroth-order step of learning rate lr gains ``lr g - lr^2 (g + s / B) T / 2`` in
expectation, with g the squared norm of the gradient over all examples, s that of what single examples add to it, B the
batch size and T the trace of the loss's curvature, all of the tuned sites alone. At the best learning rate, and where
the batch's noise outweighs g, as it does in fine-tuning, that is ``B g^2 / (2 s T)``. For two candidates with
probabilities p and 1 - p and their difference of logits f the Gauss-Newton curvature is ``p (1 - p) |grad f|^2``, and s
about the same: so sites gain in proportion to ``(g / T)^2``. This prints g, T and g / T for every kind of site and
every sixth of the layers, by backpropagation, one example at a time: the model's preference for one answer, which any
step repairs first, is taken off before.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict

import torch
from torch import Tensor

from zotune.bench.steps import prepare


def main() -> None:
    """Print a line for every kind of site and part of the model, those that gain most first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400, help="training examples to look at")
    parser.add_argument("--model", help="hub id or folder; default: the demonstration's")
    parser.add_argument("--data", help="folder with SST-2's train and validation; default: the demonstration's reviews")
    args = parser.parse_args()
    setting = prepare(model=args.model, data=args.data, dtype="float32", batch_size=args.rows)
    model, examples = setting.model, setting.batch(0)
    with torch.no_grad():
        margins = torch.stack([_margin(model, example) for example in examples])
    gold = torch.tensor([float(example.gold or 0) for example in examples])
    right = torch.sigmoid(margins - _preference(margins, gold))

    sites = list(model.named_parameters())
    sums = {name: torch.zeros_like(parameter) for name, parameter in sites}
    own, trace = defaultdict(float), defaultdict(float)
    for example, share, label in zip(examples, right.tolist(), gold.tolist(), strict=True):
        model.zero_grad()
        _margin(model, example).backward()
        for name, parameter in sites:
            square = float(parameter.grad.square().sum())
            sums[name].add_(parameter.grad, alpha=share - label)
            own[name] += (share - label) ** 2 * square
            trace[name] += share * (1 - share) * square / len(examples)
    pairs = len(examples) * (len(examples) - 1)
    agreed = {name: (float(sums[name].square().sum()) - own[name]) / pairs for name, _ in sites}
    _table(agreed, trace, model.config.num_hidden_layers)


def _margin(model: torch.nn.Module, example: object) -> Tensor:
    """Difference of the candidates' logits, the second's less the first's."""
    row = example.row  # type: ignore[attr-defined]
    first, second = (candidate.tokens[0] for candidate in row.candidates)
    logits = model(input_ids=torch.tensor([row.prompt]), logits_to_keep=1).logits[0, -1]
    return logits[second] - logits[first]


def _preference(margins: Tensor, gold: Tensor) -> float:
    """What to take off every margin so that the answers are right as often as they are given, by bisection."""
    low, high = float(margins.min()) - 50, float(margins.max()) + 50
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.sigmoid(margins - middle).mean() > gold.mean() else (low, middle)
    return low


def _table(agreed: dict[str, float], trace: dict[str, float], layers: int) -> None:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in agreed:
        place = re.search(r"\.(\d+)\.(.+)", name)
        sixth = f"{6 * int(place[1]) // layers + 1}/6" if place else ""
        groups[f"{place[2] if place else name} {sixth}".strip()].append(name)
    found = {group: (sum(agreed[n] for n in names), sum(trace[n] for n in names)) for group, names in groups.items()}
    print(f"{'site':48} {'g':>10} {'T':>10} {'g / T':>9}")
    for group, (g, t) in sorted(found.items(), key=lambda item: -item[1][0] / item[1][1]):
        print(f"{group:48} {g:10.4f} {t:10.3f} {g / t:9.5f}")


if __name__ == "__main__":
    main()
