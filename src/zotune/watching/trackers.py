"""Trackers: reporters that hand a run's figures to TensorBoard and to Weights & Biases.

``metrics.jsonl`` stays the record of a run; what a tracker writes follows from it. A tracker that cannot begin says so
before the first step; one that fails later is left out with a notice, and the run goes on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from zotune.config import Config, dump
from zotune.errors import ConfigError, JournalError, reason
from zotune.figures import Smoothed
from zotune.reporters import SCORES, Record, Reporter, SilentReporter
from zotune.watching.metrics import read

Figures = Mapping[str, float]
Notice = Callable[[str], None]
_FLUSH_SECONDS = 10.0


def build(config: Config, notice: Notice = lambda text: None) -> list[Reporter]:
    """The trackers that the table ``[track]`` asks for; nothing is written before `Reporter.start`.

    Args:
        config: The run's configuration.
        notice: Told when a tracker fails in the middle of a run.

    Raises:
        ConfigError: A package that it needs is not installed.
    """
    sinks: list[Sink] = [TensorBoard()] if config.track.tensorboard else []
    if config.track.wandb is not None:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                "track.wandb needs the package wandb, which is not installed. "
                "Run 'pip install wandb', or leave track.wandb out."
            )
        sinks.append(WeightsAndBiases(config.track.wandb))
    return [Tracker(sink, config, notice) for sink in sinks]


class Sink(Protocol):
    """Where a tracker's figures go.

    Attributes:
        name: For messages.
        rewrites: Whether each start begins a new record, so that what a resumed run did before is logged again.
    """

    name: str
    rewrites: bool

    def open(self, path: Path, config: Config) -> None:
        """Begin to log the run in directory ``path``."""
        ...

    def log(self, step: int, figures: Figures, when: float) -> None:
        """Take in figures, all finite, after ``step`` finished steps, at ``when`` (seconds since 1970)."""
        ...

    def close(self) -> None:
        """End; calling it again changes nothing."""
        ...


class Tracker(SilentReporter):
    """A reporter that turns records into figures for a sink.

    Args:
        sink: Where they go.
        config: The run's configuration.
        notice: Told if the sink fails in the middle of the run.
    """

    def __init__(self, sink: Sink, config: Config, notice: Notice) -> None:
        self._sink: Sink | None = sink
        self._config, self._notice = config, notice
        self._smoothed = Smoothed()

    def start(self, path: Path, steps: int, done: int) -> None:
        """Open the sink, and give it what a resumed run did before.

        Raises:
            ConfigError: The sink cannot be opened.
        """
        assert self._sink is not None
        past = self._past(path, done)
        when = time.time() - sum(record["seconds"] or 0.0 for record in past)
        try:
            self._sink.open(path, self._config)
            for record in past:
                when += record["seconds"] or 0.0
                figures = self._figures(record)
                if self._sink.rewrites:
                    self._sink.log(record["step"], figures, when)
        # What a tracker's library raises is its own affair, and all of it means that it cannot be used.
        except Exception as error:
            raise ConfigError(
                f"{self._sink.name} cannot be used: {reason(error)}. Mend that, or turn it off in the table [track] "
                f"of {path / 'config.toml'}; then go on with 'zotune resume {path}'."
            ) from error

    def step(self, record: Record) -> None:
        """Log a step."""
        self._log(record)

    def evaluation(self, record: Record) -> None:
        """Log an evaluation."""
        self._log(record)

    def finish(self) -> None:
        """Close the sink."""
        self._guard(lambda sink: sink.close())

    def _past(self, path: Path, done: int) -> list[dict[str, Any]]:
        """What the run has recorded of its first ``done`` steps, in the order in which it happened."""
        if not done:
            return []
        try:
            metrics = read(path)
        except JournalError as error:
            self._notice(f"earlier steps are left out of trackers: {error}")
            return []
        past = [record for record in metrics.steps + metrics.evaluations if record["step"] <= done]
        return sorted(past, key=lambda record: record["step"])

    def _log(self, record: Record) -> None:
        figures = self._figures(record)
        self._guard(lambda sink: sink.log(record["step"], figures, time.time()))

    def _figures(self, record: Record) -> Figures:
        """The finite figures of a record, by name."""
        if record["kind"] == "eval":
            named = {f"validation/{key}": record.get(key) for key in ("loss", *SCORES)}
        else:
            named = {
                "train/loss": record["loss"],
                "train/loss_smoothed": self._smoothed.add(record["loss"]),
                "train/lr": record["lr"],
                "train/coefficient_rms": _rms(record["coefficients"]),
                "train/rows_per_s": record["rows_per_s"],
            }
        return {name: value for name, value in named.items() if value is not None and math.isfinite(value)}

    def _guard(self, act: Callable[[Sink], None]) -> None:
        """Use the sink, for as long as it works: a tracker must not end a run."""
        if self._sink is None:
            return
        try:
            act(self._sink)
        except Exception as error:
            self._notice(f"{self._sink.name} failed and is left out from here on: {reason(error)}")
            self._sink = None


class TensorBoard:
    """Event files in ``RUN/tensorboard``, for ``tensorboard --logdir``.

    A resumed run writes its file anew from ``metrics.jsonl``: no step is there twice, and none that a killed process
    had not flushed is missing. Records are written by the calling thread, so a full disk is noticed and not waited for.
    """

    name = "TensorBoard"
    rewrites = True

    def __init__(self) -> None:
        self._writer: Any = None
        self._flushed = 0.0

    def open(self, path: Path, config: Config) -> None:
        """See `Sink.open`."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.summary import text

        folder = path / "tensorboard"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = EventsWriter(str(folder / "events"))
        # Indented by four, Markdown shows it as it is.
        self._write(0, time.time(), text("config", "".join(f"    {line}\n" for line in dump(config).splitlines())))

    def log(self, step: int, figures: Figures, when: float) -> None:
        """See `Sink.log`."""
        from tensorboardX.proto.summary_pb2 import Summary

        self._write(
            step, when, Summary(value=[Summary.Value(tag=name, simple_value=figures[name]) for name in figures])
        )
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """See `Sink.close`."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, step: int, when: float, summary: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(step=step, wall_time=when, summary=summary))


class WeightsAndBiases:
    """A run of a Weights & Biases project, under the run directory's name; resuming goes on with the same one.

    Its own environment variables apply, e.g. ``WANDB_MODE=offline`` and ``WANDB_ENTITY``.

    Args:
        project: The project's name.
    """

    name = "Weights & Biases"
    rewrites = False

    def __init__(self, project: str) -> None:
        self._project = project
        self._run: Any = None

    def open(self, path: Path, config: Config) -> None:
        """See `Sink.open`."""
        import wandb

        self._run = wandb.init(
            project=self._project,
            name=path.resolve().name,
            id=_identity(path),
            resume="allow",
            dir=path,
            config=config.model_dump(exclude_none=True),
            settings=wandb.Settings(console="off"),
        )

    def log(self, step: int, figures: Figures, when: float) -> None:
        """See `Sink.log`."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """See `Sink.close`."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def _identity(path: Path) -> str:
    """Always the same for a run directory, and another one for each."""
    manifest = path / "manifest.json"
    text = manifest.read_bytes() if manifest.is_file() else b""
    return hashlib.sha256(text + path.resolve().name.encode()).hexdigest()[:16]


def _rms(coefficients: list[float]) -> float | None:
    """Root mean square; None for a step without coefficients."""
    return math.hypot(*coefficients) / math.sqrt(len(coefficients)) if coefficients else None
