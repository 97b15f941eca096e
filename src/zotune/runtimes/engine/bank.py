"""The update bank: finished windows kept beside the weights instead of in them.

A window ends with an update ``B V^T``. The bank stacks such pairs along the rank, so that a layer computes

    y = keep * x W^T + (x V_bank) B_bank^T + ...

with ``W`` as it was loaded. When a budget of columns is full, the sum goes into the weight with one rounding; where
there is no plain weight to go into, because the base is quantised, it is cut to the best approximation of half the
budget. Vectors are plain sums, which never fill up.

A window's factors are those of a run without a bank, bit for bit, because directions and update rules never look at
the weights. So a journal replays without a bank too; there every window is folded and rounded.

The float32 masters lie on the host and are whole on every shard; layers hold copies in static buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.errors import ModelError
from zotune.layout import Site
from zotune.protocol import Update
from zotune.runtimes.engine.tokens import TunedVector
from zotune.runtimes.engine.tokenwise import TokenSpace, Tuned, TunedTable
from zotune.runtimes.engine.weights import Weights
from zotune.runtimes.folding.fold import Fold
from zotune.runtimes.folding.move import LowRankChange, Move
from zotune.runtimes.spaces.lowrank import LowRankMatrix
from zotune.runtimes.spaces.mixture import Vector


class Stack:
    """Finished windows of one site.

    Attributes:
        b: float32 ``(out, budget)``, zero from column ``used`` on; of a vector the sum ``(n,)``.
        v: float32 ``(in, budget)``, the same; None for a vector.
        used: Columns in use.
        keep: What weight decay has left of the weight since it was last folded into.
        lost: Bound of the Frobenius norm of all that `recompress` has cut off.
    """

    def __init__(self, site: Site, budget: int) -> None:
        self.b = torch.zeros((site.shape[0], budget) if site.is_matrix else site.shape)
        self.v = torch.zeros(site.shape[1], budget) if site.is_matrix else None
        self.used, self.keep, self.lost = 0, 1.0, 0.0

    def push(self, state: LowRankMatrix | Vector, keep: float) -> None:
        """Put a window's update on top; its decay acts on all that was there before."""
        self.b.mul_(keep)
        self.keep, self.lost = self.keep * keep, self.lost * keep
        update = state.update.cpu()
        if self.v is None or not isinstance(state, LowRankMatrix):
            self.b.add_(update)
        else:
            here = slice(self.used, self.used + update.shape[1])
            self.b[:, here], self.v[:, here], self.used = update, state.v.cpu(), here.stop

    def is_full(self, rank: int) -> bool:
        """Whether there is no room for another window."""
        return self.v is not None and self.used + rank > self.v.shape[1]

    def change(self, device: torch.device) -> LowRankChange:
        """The sum of a matrix's windows, to be computed on a device."""
        assert self.v is not None
        return LowRankChange(*(part[:, : self.used].to(device) for part in (self.b, self.v)))

    def clear(self) -> None:
        """Start anew: a matrix's sum is in the weight now."""
        assert self.v is not None
        self._put(self.b[:, :0], self.v[:, :0])
        self.keep, self.lost = 1.0, 0.0

    def recompress(self) -> float:
        """Cut a matrix's sum to the best approximation of half the budget.

        Returns:
            Bound of the sum's relative error in the Frobenius norm, all cuts so far counted.
        """
        assert self.v is not None
        b, v, kept, cut = truncated(self.b[:, : self.used], self.v[:, : self.used], self.v.shape[1] // 2)
        self._put(b, v)
        self.lost += cut
        return self.lost / kept if kept else 0.0

    def _put(self, b: Tensor, v: Tensor) -> None:
        assert self.v is not None
        self.used = b.shape[1]
        for master, columns in ((self.b, b.clone()), (self.v, v.clone())):
            master.zero_()[:, : self.used] = columns


def truncated(b: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best approximation of ``b v^T`` of a lower rank, without forming the product.

    Args:
        b: float32 ``(out, k)``.
        v: float32 ``(in, k)``.
        rank: Most columns to keep.

    Returns:
        Factors of at most ``rank`` columns, of equal norm so that both survive 16 bits, and the Frobenius norms of
        what they stand for and of what was cut off.
    """
    (qb, rb), (qv, rv) = torch.linalg.qr(b), torch.linalg.qr(v)
    left, spectrum, right = torch.linalg.svd(rb @ rv.T, full_matrices=False)
    root = spectrum[:rank].sqrt()
    norms = [float(part.double().norm()) for part in (spectrum[:rank], spectrum[rank:])]
    return qb @ (left[:, :rank] * root), qv @ (right[:rank].T * root), norms[0], norms[1]


class Bank(Fold):
    """The finished windows of all sites: where a window's update goes instead of into the weights.

    Args:
        space: Whose windows; its modules show the bank from now on.
        budget: Most columns beside a matrix.
        fixed: Sites whose weights cannot be folded into.
        weights: Gives the weights of the others; called when the first of them is folded.

    Raises:
        ModelError: The budget has no room for two windows.
    """

    def __init__(self, space: TokenSpace, budget: int, fixed: Collection[Site], weights: Callable[[], Weights]) -> None:
        self.rank = space.method.rank
        if budget < 2 * self.rank:
            raise ModelError(
                f"runtime.vllm.bank_rank is {budget}, but the update bank needs room for two windows of rank "
                f"{self.rank}. Set it to {2 * self.rank} or more, or to 0 for none."
            )
        self.space, self.budget, self.fixed, self._weights = space, budget, frozenset(fixed), weights
        self.stacks = {site: Stack(site, budget) for site in space.sites}
        self.errors: list[tuple[int, float, float]] = []
        self._cuts: list[float] = []
        self._moved = False
        for module in space.modules:
            if not isinstance(module, TunedVector):
                module.open_bank(budget)
        space.bank = self

    def apply(self, update: Update) -> None:
        """Close a window: its update goes into the bank, and what is full is folded or recompressed."""
        nothing = dict.fromkeys(self.stacks, torch.empty(0))
        before = {site: stack.used for site, stack in self.stacks.items()}
        self._moved = True
        self.space.apply(update, nothing, self)
        if self._cuts:
            self.errors.append((update.step, max(self._cuts), sum(self._cuts) / len(self._cuts)))
            self._cuts.clear()
        if any(site not in self.fixed and stack.used < before[site] for site, stack in self.stacks.items()):
            self._weights().repack()

    def add(self, move: Move, step: int) -> None:
        """Take the window's factors from the space instead of their product."""
        site = move.site
        stack = self.stacks[site]
        stack.push(self.space.sites[site], move.keep)
        if not stack.is_full(self.rank):
            return
        if site in self.fixed:
            self._cuts.append(stack.recompress())
        else:
            weights = self._weights()
            view = weights.views[site]
            weights.fold.add(Move(site, view, stack.change(view.device), stack.keep), step)
            stack.clear()

    def show(self, modules: Sequence[Tuned]) -> None:
        """Copy into the modules' buffers what they must see of the bank, beside the update that they show."""
        for module in modules:
            self._show(module)
        self._moved = False

    def _show(self, module: Tuned) -> None:
        first = module.parts[0].site
        # In the middle of a window, decay has acted on the bank as it has on the weight.
        module.keep.fill_(self.space.sites[first].keep * self.stacks[first].keep)
        if not isinstance(module, TunedTable):
            for part in module.vectors:
                state = self.space.sites[part.site]
                # Rounded once, because what is shown is the bank and the window's update in one number.
                kept = self.stacks[part.site].b.to(state.update.device) * state.keep
                module.vector()[part.local] = part.of(kept + state.update)
        if isinstance(module, TunedVector) or module.bank is None or not (self._moved or module.decays):
            return
        for index, part in enumerate(module.parts):
            stack, keep = self.stacks[part.site], self.space.sites[part.site].keep
            assert stack.v is not None
            module.bank.show(index, stack.b * keep if module.decays else stack.b, stack.v)

    def about(self) -> dict[str, Any]:
        """How full it is, and what recompression has cost since the engine was started.

        Returns:
            ``budget`` and ``used`` in columns, and ``recompressed``: for every time its step, and the worst and the
            mean relative Frobenius error over the sites, bounds that count all cuts so far.
        """
        used = max(stack.used for stack in self.stacks.values())
        return {"budget": self.budget, "used": used, "recompressed": [list(each) for each in self.errors]}

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint, whole on every shard."""
        found = {f"bank/b/{site.name}": stack.b for site, stack in self.stacks.items()}
        found |= {f"bank/v/{site.name}": stack.v for site, stack in self.stacks.items() if stack.v is not None}
        rows = [(stack.used, stack.keep, stack.lost) for stack in self.stacks.values()]
        return found | {"bank/columns": torch.tensor(rows, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave; the modules show it when the space has loaded its own."""
        for row, (site, stack) in zip(state["bank/columns"].tolist(), self.stacks.items(), strict=True):
            stack.b.copy_(state[f"bank/b/{site.name}"])
            if stack.v is not None:
                stack.v.copy_(state[f"bank/v/{site.name}"])
            stack.used, stack.keep, stack.lost = int(row[0]), row[1], row[2]
        self._moved = True


def settled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a run with a bank as one without: weights and their float32 copies have the bank in them.

    Args:
        state: What a `Bank`, its weights and its space gave; one without a bank is given back as it is.

    Raises:
        ModelError: A weight is not there, because it is quantised.
    """
    names = [name.removeprefix("bank/b/") for name in state if name.startswith("bank/b/")]
    found = {name: tensor for name, tensor in state.items() if not name.startswith("bank/")}
    for name, row in zip(names, state["bank/columns"].tolist() if names else (), strict=True):
        if f"weight/{name}" not in state:
            raise ModelError(
                f"{name} is quantised, so what was learnt cannot be written into it. Export an adapter instead."
            )
        b, used, keep = state[f"bank/b/{name}"], int(row[0]), row[1]
        change = b[:, :used] @ state[f"bank/v/{name}"][:, :used].T if b.dim() == 2 else b
        exact = state.get(f"master/{name}", state[f"weight/{name}"]).float() * keep + change
        found[f"weight/{name}"] = exact.to(state[f"weight/{name}"].dtype)
        if f"master/{name}" in state:
            found[f"master/{name}"] = exact
    return found
