"""Which sites of a model are worth tuning with forward passes: where the examples' gradients agree.

    python benchmarks/search/agreement.py --rows 256 --data data/sst2

Sites gain in proportion to ``(g / T)^2``, with g the squared norm of the gradient over all examples and T the trace of
the loss's curvature (docs/methods.md, ``lozo-late``). Of a choice between two answers with probabilities p and 1 - p
and difference of logits f the Gauss-Newton curvature is ``p (1 - p) |grad f|^2``. What all examples' ``grad f`` have in
common moves nothing but the preference for one answer: calibration takes it off. With ``--validation`` g is what the
gradients over training and validation rows have in common: what is left to learn that holds for both.

This prints, for every kind of site in every fifth of the layers, g without that preference, T with and without it, and
both ratios, by backpropagation of one example at a time. The model's preference for one answer, which any step repairs
first, is taken off before.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zotune.bench.steps import prepare
from zotune.rows import Example


@dataclass
class Site:
    """Sums over the examples of what one parameter's gradients ``J = grad f`` are, with residual r and weight w."""

    slope: Tensor
    common: Tensor = field(init=False)
    squared: Tensor = field(init=False)
    weighted: Tensor = field(init=False)
    own: float = 0.0
    trace: float = 0.0

    def __post_init__(self) -> None:
        self.common, self.squared, self.weighted = (torch.zeros_like(self.slope) for _ in range(3))

    def add(self, gradient: Tensor, residual: float, weight: float) -> None:
        """One example's."""
        norm = float(gradient.square().sum())
        self.slope.add_(gradient, alpha=residual)
        self.common.add_(gradient)
        self.squared.add_(gradient, alpha=residual**2)
        self.weighted.add_(gradient, alpha=weight)
        self.own += residual**2 * norm
        self.trace += weight * norm

    def found(self, residuals: Tensor, weights: Tensor) -> tuple[float, float, float]:
        """g without pairs of an example with itself, T, and T of gradients less their mean; residuals sum to zero."""
        count = len(residuals)
        mean = self.common / count
        shared = float(mean.square().sum())
        own = self.own - 2 * float((self.squared * mean).sum()) + float(residuals.square().sum()) * shared
        centred = self.trace - 2 * float((self.weighted * mean).sum()) + float(weights.sum()) * shared
        g = (float(self.slope.square().sum()) - own) / (count * (count - 1))
        return g, self.trace / count, centred / count


def main() -> None:
    """Print a line for every kind of site and part of the model, those that gain most first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="training examples to look at")
    parser.add_argument("--validation", action="store_true", help="g between these and as many validation examples")
    parser.add_argument("--model", help="hub id or folder; default: the demonstration's")
    parser.add_argument("--data", help="folder with SST-2's train and validation; default: the demonstration's reviews")
    args = parser.parse_args()
    setting = prepare(model=args.model, data=args.data, dtype="float32", batch_size=args.rows)
    sites, residuals, weights = _summed(setting.model, setting.batch(0))
    found = {name: site.found(residuals, weights) for name, site in sites.items()}
    if args.validation:
        held_out = setting.dataset.validation[: args.rows]
        pairs = args.rows * len(held_out)
        for name, other in _summed(setting.model, held_out)[0].items():
            found[name] = (float((sites[name].slope * other.slope).sum()) / pairs, *found[name][1:])
    _print(found, setting.model.config.num_hidden_layers)


def _summed(model: Any, examples: Sequence[Example]) -> tuple[dict[str, Site], Tensor, Tensor]:
    """The sums of every parameter over the examples, their residuals and their weights."""
    with torch.no_grad():
        margins = torch.stack([_margin(model, example) for example in examples])
    gold = torch.tensor([float(example.gold) for example in examples])
    right = torch.sigmoid(margins - _preference(margins, gold))
    residuals, weights = right - gold, right * (1 - right)
    sites = {name: Site(torch.zeros_like(parameter)) for name, parameter in model.named_parameters()}
    for example, residual, weight in zip(examples, residuals.tolist(), weights.tolist(), strict=True):
        model.zero_grad()
        _margin(model, example).backward()
        for name, parameter in model.named_parameters():
            sites[name].add(parameter.grad, residual, weight)
    return sites, residuals, weights


def _print(found: dict[str, tuple[float, float, float]], layers: int) -> None:
    """Sums of g, T and T calibrated over kinds of sites in fifths of the layers, by what they gain."""
    groups: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for name, figures in found.items():
        groups["all"].append(figures)
        place = re.search(r"\.(\d+)\.(.+)", name)
        fifth = f"{5 * int(place[1]) // layers + 1}/5" if place else ""
        for group in [f"{place[2]} {fifth}", f"layers {fifth}"] if place else [name]:
            groups[group].append(figures)
    print(f"{'sites':42} {'g':>9} {'T':>9} {'calibrated':>10} {'g / T':>9} {'calibrated':>10}")
    rows = {group: [sum(column) for column in zip(*figures, strict=True)] for group, figures in groups.items()}
    for group, (g, trace, centred) in sorted(rows.items(), key=lambda row: -row[1][0] / row[1][2]):
        print(f"{group:42} {g:9.4f} {trace:9.3f} {centred:10.3f} {g / trace:9.5f} {g / centred:10.5f}")


def _margin(model: nn.Module, example: Example) -> Tensor:
    """Difference of the answers' logits, the second's less the first's."""
    first, second = (candidate.tokens[0] for candidate in example.row.candidates)
    logits = model(input_ids=torch.tensor([example.row.prompt]), logits_to_keep=1).logits[0, -1]
    return logits[second] - logits[first]


def _preference(margins: Tensor, gold: Tensor) -> float:
    """What to take off every margin so that either answer is as likely as it is right, by bisection."""
    low, high = float(margins.min()) - 50, float(margins.max()) + 50
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.sigmoid(margins - middle).mean() > gold.mean() else (low, middle)
    return low


if __name__ == "__main__":
    main()
