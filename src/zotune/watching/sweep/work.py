"""Carrying out a sweep: one run after the other, from wherever each of them is."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from zotune.config import AUTO, Config
from zotune.errors import ZotuneError, required
from zotune.figures import counted
from zotune.journal.branches import open_run
from zotune.reporters import Reporter
from zotune.watching.differences import shown_apart, values
from zotune.watching.standing import Standing, standing
from zotune.watching.sweep.plan import PLANNED, Plan, Planned


def run(plan: Plan, reporter: Callable[[], Reporter]) -> dict[str, str]:
    """Do what is left of a sweep; whatever fails is told of and the others go on.

    Ctrl-C ends the run in progress as it ends any run, and the sweep with it. Doing the sweep again goes on from there.

    Args:
        plan: The sweep.
        reporter: Makes the reporter of a run.

    Returns:
        Why runs failed, by their names.
    """
    failures = {}
    required(plan, Plan, PLANNED)
    for place, each in enumerate(plan.runs, start=1):
        live, where = reporter(), whereabouts(each)
        live.notice(f"[{place}/{len(plan.runs)}] {each.name}: {_intent(where)}")
        if where.state not in ("waiting", "interrupted"):
            continue
        try:
            carry_on(each, where, live)
        # One run out of memory, or a model whose code is at fault, must not cost the night's other runs.
        except Exception as error:
            failures[each.name] = str(error) if isinstance(error, ZotuneError) else f"{type(error).__name__}: {error}"
            live.notice(f"{each.name} failed: {failures[each.name]}")
        finally:
            live.finish()
            release()
    return failures


def whereabouts(planned: Planned) -> Standing:
    """Where a run of a sweep stands: it is started while it is waiting, and resumed when it was interrupted."""
    if not planned.path.exists():
        return Standing("waiting")
    try:
        directory, found = open_run(planned.path)
        where = standing(directory, planned.config)
    except ZotuneError as error:
        return Standing("failed", reason=str(error))
    if other := _other(found, planned.config):
        reason = f"{planned.path} is another run than the sweep's: {other}. Move it away."
        return Standing("failed", where.steps, reason)
    return where


def carry_on(planned: Planned, where: Standing, live: Reporter) -> None:
    """Start or go on with a run that is waiting or was interrupted; raises what `zotune.train` does."""
    # Transformers, which takes seconds; a summary of what is there needs none of it.
    from zotune.train import resume, start

    threads = torch.get_num_threads()
    try:
        if where.state == "waiting":
            start(planned.config, live)
        else:
            resume(planned.path, live)
    finally:
        # A run that sets runtime.threads must not set them for the next one.
        torch.set_num_threads(threads)


def release() -> None:
    """Give back the memory of the run before: a model may hang in reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _other(found: Config, planned: Config) -> str:
    """In what a run directory's configuration is not the planned one.

    Who is told of a run does not count, nor how many replicas `zotune scale` has given it.
    """
    there, here = values(found), values(planned)
    if planned.method.lr == AUTO:
        # The run has the one that was chosen when it began.
        here["method.lr"] = found.method.lr
    told = {
        key: shown_apart([there.get(key), here.get(key)])
        for key in dict.fromkeys([*there, *here])
        if not key.startswith(("track.", "runtime.ray.replicas")) and there.get(key) != here.get(key)
    }
    return ", ".join(f"{key} is {old} there and {new} in the sweep" for key, (old, new) in told.items())


def _intent(where: Standing) -> str:
    if where.state == "waiting":
        return "starting"
    if where.state == "interrupted":
        return f"going on after step {where.steps}"
    return f"{where.state}: {where.reason}" if where.reason else f"{where.state}, {counted(where.steps, 'step')}"
