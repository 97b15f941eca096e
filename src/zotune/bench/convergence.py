"""``zotune bench convergence``: presets and other procedures learn the same rows in the same order.

A preset's training is an ordinary run directory, so one that was interrupted goes on where it stood.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from zotune import demo, learning_rate, models
from zotune.bench import cases, curve, work
from zotune.bench.contenders import Contender, Entry, enter
from zotune.bench.curve import Evaluated, Spent
from zotune.bench.procedures import PROCEDURES, load, train
from zotune.bench.results import Case, Result, Results
from zotune.bench.steps import resolved, threads_set
from zotune.config import AUTO
from zotune.data import BatchOrder
from zotune.errors import ConfigError, ModelError
from zotune.figures import counted
from zotune.journal.branches import open_run
from zotune.presets import resolve
from zotune.reporters import SilentReporter
from zotune.rows import Example
from zotune.run import RunDirectory
from zotune.watching import metrics
from zotune.watching.sweep import Planned
from zotune.watching.sweep.work import carry_on, release, whereabouts

KIND = "convergence"
OFFICIAL_COST = 8.0
"""About how much longer than zotune's a step of the peers takes; see docs/performance.md."""


def convergence(
    methods: Sequence[str],
    *,
    out: Path,
    tasks: Sequence[str] = ("sst2",),
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 300,
    eval_every: int = 50,
    batch_size: int = 16,
    model: str | None = None,
    data: Path | None = None,
    validation_rows: int | None = None,
    dtype: str = "auto",
    threads: int | None = None,
    retry: bool = False,
    minutes: float = float("inf"),
    console: Console | None = None,
) -> list[Result]:
    """Train every method on every task with every seed, and keep a learning curve of each.

    Args:
        methods: ``NAME,KEY=VALUE,...`` each: a preset, or one of `zotune.bench.procedures.PROCEDURES`, with settings of
            ``[method]``, and ``steps``, ``batch_size`` and ``eval_every``, where it has its own.
        out: Folder of the results, with the run directories of presets in ``runs``.
        tasks: Built-in tasks.
        seeds: Of directions and batch order.
        steps: Of each training.
        eval_every: Steps between evaluations.
        batch_size: Examples per step.
        model: Hub id or folder of a causal language model; default: the demonstration's.
        data: Folder with a folder per task that has ``train`` and ``validation`` rows, as ``.jsonl.gz`` or ``.jsonl``;
            default: the hub's.
        validation_rows: To evaluate on; default: as many as the task says.
        dtype: Of the model, on all sides; ``auto``: bfloat16 where the device multiplies it natively, else float32.
        threads: CPU threads; default: PyTorch's.
        retry: Measure again what failed.
        minutes: Begin no training after so long.
        console: Told of every training in one line; default: standard error.

    Returns:
        What has been measured so far.

    Raises:
        ConfigError: A name or a value is not allowed; nothing has been trained then.
        DataError: Rows are not there.
        ModelError: The model is not there.
    """
    for name, given in (("methods", methods), ("tasks", tasks), ("seeds", seeds)):
        if not given:
            raise ConfigError(f"there are no {name} to measure; give at least one")
    base: dict[str, Any] = {
        "model": {"path": model or str(demo.fetch().model), "dtype": resolved(dtype)},
        "data": {"validation_size": validation_rows} if validation_rows else {},
        # A checkpoint is as large as the model, and the journal alone gives back any step.
        "train": {"steps": steps, "batch_size": batch_size, "eval_every": eval_every, "keep_checkpoints": 1},
        "track": {"tensorboard": False},
    }
    points = itertools.product(map(Contender.read, methods), tasks, seeds)
    entries = [enter(contender, base, task, seed, data, out / "runs") for contender, task, seed in points]

    # All have the same model.
    models.load_config(entries[0].config.model)

    def entry(case: Case) -> Entry:
        return next(each for each in entries if each.case == case)

    with threads_set(threads):
        return cases.run(
            Results(out, KIND),
            [each.case for each in entries],
            lambda case: measure(entry(case)),
            console=console or Console(stderr=True),
            cost=lambda case: _cost(entry(case)),
            retry=retry,
            minutes=minutes,
        )


def measure(entry: Entry) -> cases.Figures:
    """Train, or go on training, and give the learning curve."""
    try:
        if procedure := PROCEDURES.get(entry.contender.name):
            found, spent, lr = list(train(procedure, entry.config)), procedure.spent, entry.config.method.lr
        else:
            found, lr = _run(entry)
            spent = _packed(resolve(entry.config.method).probes)
    finally:
        release()
    _, data = load(entry.config, mapped=True)
    method, options = entry.config.method, entry.config.train
    order = BatchOrder(len(data.train), options.batch_size, options.seed)
    before = Spent()
    if method.lr == AUTO:
        probed = _packed(learning_rate.probing(resolve(method)).method.probes)
        before = curve.spending(probed, data.train, order, learning_rate.STEPS)[-1]
    spending = [before + each for each in curve.spending(spent, data.train, order, options.steps)]
    return {**curve.figures(curve.along(found, spending)), "lr": lr}


def _cost(entry: Entry) -> float:
    options = entry.config.train
    factor = OFFICIAL_COST if entry.contender.name in PROCEDURES else resolve(entry.config.method).probes / 2
    return factor * options.steps * options.batch_size


def _packed(probes: int) -> Callable[[Sequence[Example]], Spent]:
    """What a step with so many probes computes: a row holds all candidates, without padding."""
    return lambda batch: Spent(probes * len(batch), work.step_tokens([example.row for example in batch], probes))


def _run(entry: Entry) -> tuple[list[Evaluated], Any]:
    """Start or go on with a preset's run, and read what it recorded, and with which learning rate."""
    planned = Planned(Path(entry.config.output).name, {}, entry.config)
    where = whereabouts(planned)
    if where.state in ("failed", "diverged"):
        raise ModelError(where.reason or f"{planned.path} diverged after {counted(where.steps, 'step')}")
    if where.state in ("waiting", "interrupted"):
        carry_on(planned, where, SilentReporter())
    return list(_recorded(planned.path)), open_run(planned.path)[1].method.lr


def _recorded(run: Path) -> Iterable[Evaluated]:
    seconds = metrics.read(run).clock()
    for step, found in RunDirectory(run).evaluations().items():
        yield Evaluated(step, found, seconds(step))
