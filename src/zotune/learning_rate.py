"""The automatic learning rate: one that fits model, data and method, from a few probes before the first step.

Polyak's step (1987, "Introduction to Optimization") goes ``L / |g|^2`` along the gradient, as if the whole loss could
be had at once. What a step of ours gains on its own batch is known exactly to first order: with coefficients ``c_i``
and slopes ``s_i = <g, D_i>`` it is ``lr sum_i c_i s_i``. Most of that is noise of one batch and one direction, so only
a small share of Polyak's step can be taken again and again:

    lr = SHARE * q ** GROWTH * mean(L) / mean(sum_i c_i s_i)    q directions a step, means over probed steps

and ``sqrt(LENGTH / T)`` of that for a run of more than LENGTH steps T, whose noise adds up for longer. Where texts are
learnt and no answer is chosen, ``mean(L)`` counts up to REACH: most of a text's loss is its own entropy, which stays.

This follows what the best learning rate depends on: the scale of the weights and of the loss, the rank and scale of a
direction, the estimator. What one direction adds off the gradient is averaged over ``q``: they allow ``q`` times the
rate while that is all that limits it (Malladi et al. 2023, MeZO), and less where batches do. SHARE and GROWTH were
found by experiment; see docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

from zotune.config import AUTO
from zotune.errors import ConfigError
from zotune.estimators import ESTIMATORS
from zotune.objectives import CompletionNLL
from zotune.optimizer import Method, Optimizer
from zotune.protocol import DirectionKey, Proposal
from zotune.session import Session

SHARE = 0.006
"""Of its batch's loss, what a step with one direction may gain to first order."""

GROWTH = 0.75
"""Power of the number of directions that the learning rate grows with."""

REACH = math.log(2)
"""Nats a token that training may take off the loss of texts: as many as a choice between two answers has."""

LENGTH = 220
"""Steps up to which the rate holds; that of a longer run falls with the root of its length."""

STEPS = 32
"""Batches to probe. They differ by a factor of ten in how steep they are, so few of them do not tell."""

DIRECTIONS = 4
"""Most to probe of each: more tell less than another batch does."""


def settled(session: Session, begun: Callable[[str], None], notice: Callable[[str], None]) -> Session:
    """The session with a learning rate, chosen now if its configuration leaves it open.

    Args:
        session: Before its first step.
        begun: Told at once that it is being chosen, which takes as long as many steps.
        notice: Told what was chosen.

    Raises:
        ConfigError: The losses of the probes say nothing.
    """
    config = session.config
    if config.method.lr != AUTO:
        return session
    begun(f"choosing the learning rate by probes on {STEPS} batches")
    lr = automatic(session)
    notice(f"learning rate {lr:g}, chosen by probes; method.lr = NUMBER sets another")
    method = replace(session.optimizer.method, lr=lr)
    chosen = config.having("method", lr=lr)
    return replace(session, config=chosen, optimizer=Optimizer(method, session.optimizer.steps))


def automatic(session: Session) -> float:
    """The learning rate for a session before its first step, rounded to two digits.

    Args:
        session: Probed on the batches of its first steps; nothing of it changes.

    Raises:
        ConfigError: No loss is finite, or none changes along any direction.
    """
    method = session.optimizer.method
    estimator, optimizer = ESTIMATORS[method.estimator], probing(method)
    levels, gains = [], []
    for step in range(STEPS):
        proposal = _in_first_window(optimizer.ask(step))
        losses, eps = session.losses(proposal, session.batch(step)[0]), proposal.probes[-1].eps
        if not all(map(math.isfinite, losses)):
            continue
        coefficients, slopes = estimator.coefficients(losses, eps), estimator.slopes(losses, eps)
        gain = math.fsum(c * s for c, s in zip(coefficients, slopes, strict=True))
        # Equal losses are as useless where a method divides by their deviation.
        if math.isfinite(gain):
            levels.append(fmean(losses))
            gains.append(gain)
    gain = fmean(gains) if gains else math.nan
    if not 0 < gain < math.inf:
        raise ConfigError(
            f"method.lr = 'auto' finds nothing to go by: the losses of its probes on {STEPS} batches are not "
            "finite or all equal. Set method.lr to a number, another method.eps, or model.dtype = 'float32'."
        )
    shortened = math.sqrt(min(1.0, LENGTH / session.optimizer.steps))
    level = min(fmean(levels), REACH if isinstance(session.data.objective, CompletionNLL) else math.inf)
    return float(f"{SHARE * shortened * method.directions**GROWTH * level / gain:.1e}")


def probing(method: Method) -> Optimizer:
    """Asks for what is probed of a method: fewer directions, at the distance that it begins with."""
    few = min(method.directions, DIRECTIONS)
    return Optimizer(replace(method, directions=few, schedule="constant", warmup_steps=0), STEPS)


def _in_first_window(proposal: Proposal) -> Proposal:
    """The same probes, as the model that has not moved yet may be asked for them."""
    probes = tuple(
        probe if probe.key is None else replace(probe, key=DirectionKey(0, probe.key.step, probe.key.index))
        for probe in proposal.probes
    )
    return replace(proposal, window=0, probes=probes)
