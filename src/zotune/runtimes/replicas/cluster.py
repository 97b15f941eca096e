"""Ray: the cluster, a place in it for every replica, and its processes. Nothing else here imports Ray."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zotune.config import ReplicasConfig
from zotune.errors import ConfigError, EngineError, reason
from zotune.figures import counted
from zotune.runtimes.replicas.replica import Replica

_OBJECT_STORE = 128 * 2**20
"""Bytes of shared memory of a cluster that a run starts: states pass through it in pieces."""

_LISTENER_SECONDS = 5.0

_QUIET: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}


class Lost(Exception):
    """A replica is gone, or has given no answer for too long."""


@dataclass(frozen=True)
class Needs:
    """What a replica takes of a node."""

    cpus: int
    gpus: int

    def __str__(self) -> str:
        cpus = counted(self.cpus, "CPU")
        return f"{cpus} and {counted(self.gpus, 'GPU')}" if self.gpus else cpus

    def fit(self, resources: dict[str, float]) -> int:
        """How many replicas a node with these resources has room for."""
        rooms = [resources.get("CPU", 0.0) // self.cpus]
        return int(min(rooms + ([resources.get("GPU", 0.0) // self.gpus] if self.gpus else [])))


class Seat:
    """A process of the cluster that a replica runs in, with the CPUs and GPUs that it holds.

    Attributes:
        node: Address of its node.
        cores: Places of the cores that it may use among its node's; none: any.
    """

    def __init__(self, actor: Any, group: Any, node: str, cores: Sequence[int]) -> None:
        self._actor, self._group, self.node, self.cores = actor, group, node, tuple(cores)

    def begin(self, method: str, *arguments: Any) -> Any:
        """Ask for one of the methods of `zotune.runtimes.replicas.replica.Replica`; what `first` and `answer` take."""
        return getattr(self._actor, method).remote(*arguments)

    def ask(self, method: str, *arguments: Any, patience: float | None = None) -> Any:
        """What one of those methods returns or raises.

        Raises:
            Lost: The process or its node is gone, or there was no answer within ``patience`` seconds.
        """
        return answer(self.begin(method, *arguments), patience)

    def leave(self) -> None:
        """End the process, in whatever state it is, and give its place back."""
        ray = load_ray()
        if ray.is_initialized():
            ray.kill(self._actor)
            ray.util.remove_placement_group(self._group)


class Cluster:
    """A connection to a Ray cluster, or a cluster of this process alone.

    Args:
        options: The table ``[runtime.ray]``.
        cpus: Cores of a replica.
        shards: GPUs of a replica where the cluster has any and the options say nothing.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, options: ReplicasConfig, cpus: int, shards: int) -> None:
        self._ours, self._local = _connect(options.address)
        nodes = [node["Resources"] for node in _nodes()]
        gpus = shards if any(node.get("GPU") for node in nodes) else 0
        self.needs = Needs(cpus, gpus if options.gpus is None else options.gpus)
        self._pin = self._local if options.pin is None else options.pin
        self._seats: list[Seat] = []
        # Replicas are hired in threads of their own.
        self._lock = threading.Lock()

    def require(self, replicas: int) -> None:
        """Make sure that the cluster is large enough, whatever else runs there.

        Raises:
            ConfigError: It is not; the message says what was asked for and what is there.
        """
        nodes = [(node["NodeManagerAddress"], node["Resources"]) for node in _nodes()]
        room = sum(self.needs.fit(resources) for _, resources in nodes)
        if room < replicas:
            there = "; ".join(
                f"node {name}: " + ", ".join(counted(round(resources.get(kind, 0)), kind) for kind in ("CPU", "GPU"))
                for name, resources in nodes
            )
            raise ConfigError(
                f"runtime.ray.replicas = {replicas} of {self.needs} each do not fit: the Ray cluster has room for "
                f"{room} ({there}). Ask for fewer, set runtime.ray.cpus or gpus, or add nodes with `ray start`."
            )

    def hire(self, patience: float) -> Seat | None:
        """A seat, with an empty replica in it; None if there was no room for it within ``patience`` seconds.

        Raises:
            Lost: The process has died while it started.
        """
        ray = load_ray()
        bundle = {"CPU": self.needs.cpus} | ({"GPU": self.needs.gpus} if self.needs.gpus else {})
        group = ray.util.placement_group([bundle], strategy="STRICT_PACK")
        if not group.wait(patience):
            ray.util.remove_placement_group(group)
            return None
        where = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group)
        actor = ray.remote(Replica).options(
            num_cpus=self.needs.cpus, num_gpus=self.needs.gpus, scheduling_strategy=where
        )
        (node,) = ray.util.placement_group_table(group)["bundles_to_node_id"].values()
        with self._lock:
            seat = Seat(actor.remote(), group, _address(node), self._free_cores(_address(node)))
            self._seats.append(seat)
        return seat

    def _free_cores(self, node: str) -> tuple[int, ...]:
        """The first cores of a node that no other replica is on, if they are to be told apart."""
        if not self._pin or self.needs.gpus:
            return ()
        taken = {core for seat in self._seats if seat.node == node for core in seat.cores}
        first = next(core for core in range(0, len(taken) + 1, self.needs.cpus) if core not in taken)
        return tuple(range(first, first + self.needs.cpus))

    def dismiss(self, seat: Seat) -> None:
        """End a replica's process."""
        with self._lock:
            known = seat in self._seats
            if known:
                self._seats.remove(seat)
        if known:
            seat.leave()

    def share(self, data: bytes) -> Any:
        """Bytes that several replicas are to have as an argument, sent once to each node.

        Raises:
            EngineError: Ray's object store is full.
        """
        try:
            return load_ray().put(data)
        except load_ray().exceptions.RayError as error:
            raise _understood(error) from error

    def close(self) -> None:
        """End all replicas, and the cluster if it is this run's own."""
        for seat in tuple(self._seats):
            self.dismiss(seat)
        if self._ours:
            load_ray().shutdown()
        # What is there from now on is another's.
        self._ours = False


def first(begun: Sequence[Any], patience: float) -> Any | None:
    """The first of several questions that has an answer; None if none has within ``patience`` seconds."""
    ready, _ = load_ray().wait(list(begun), timeout=patience)
    return ready[0] if ready else None


def answer(begun: Any, patience: float | None = None) -> Any:
    """What a question's method returns or raises; see `Seat.ask`."""
    ray = load_ray()
    try:
        return ray.get(begun, timeout=patience)
    except ray.exceptions.GetTimeoutError:
        raise Lost(f"it gave no answer for {patience:.0f} s") from None
    except ray.exceptions.RayError as error:
        raise _understood(error) from error


def _understood(error: Any) -> Exception:
    """What an error of Ray's means here."""
    known = load_ray().exceptions
    if isinstance(error, known.RayTaskError):
        return error.cause if isinstance(error.cause, Exception) else EngineError(f"a replica failed: {reason(error)}")
    if isinstance(error, known.ObjectStoreFullError | known.OutOfDiskError):
        return EngineError(
            "Ray's object store is full, so a state cannot be moved. Free memory and disk space on its nodes, or start "
            "the cluster with a larger one (`ray start --object-store-memory`); `zotune resume` goes on from there."
        )
    if isinstance(error, known.OutOfMemoryError):
        return Lost("its node ran out of memory")
    if isinstance(error, known.RayActorError | known.ObjectLostError | known.NodeDiedError | known.TaskCancelledError):
        vanished = re.search(r"\bnode\b.*\b(died|dead|terminated)", str(error))
        return Lost("its node vanished" if vanished else "its process ended")
    return EngineError(f"Ray failed: {reason(error)}")


def _connect(address: str) -> tuple[bool, bool]:
    """Have Ray connected; whether that was done here, and whether the cluster is new."""
    ray = load_ray()
    if ray.is_initialized():
        return False, False
    if address not in ("auto", "local"):
        _require_listener(address)
    if address != "local":
        try:
            ray.init(address, **_QUIET)
            return True, False
        except (ConnectionError, RuntimeError, ValueError) as error:
            if address != "auto":
                raise _no_cluster(address, reason(error)) from error
    start_local(len(os.sched_getaffinity(0)))
    return True, True


def _require_listener(address: str) -> None:
    """Make sure that something listens there: Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_LISTENER_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address, reason(error)) from error


def _no_cluster(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"runtime.ray.address = {address!r}: there is no Ray cluster ({why}). Start one with `ray start --head` and "
        "give the host:port that it prints, or use 'auto' or 'local'."
    )


def start_local(cpus: int) -> None:
    """Start a cluster of this process alone, which ends with it.

    Args:
        cpus: How many it takes itself to have.

    Raises:
        EngineError: Ray's processes did not come up.
    """
    # Replicas get what memory there is, as a runtime in this process would: Ray's monitor also counts other programs.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    ray = load_ray()
    for last in (False, False, True):
        try:
            with _deaf_to_sigterm():
                ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=_OBJECT_STORE, **_QUIET)
            return
        # Ray gives its processes 30 seconds, and on a crowded machine they may need more; its error has no type.
        except Exception as error:
            ray.shutdown()
            if last:
                raise EngineError(f"Ray cannot start a cluster on this machine: {reason(error)}") from error


@contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    """Processes that begin here are not ended by a SIGTERM; this one heeds it afterwards.

    A scheduler, or `timeout`, sends it to all processes of a job: the cluster has to last until the run has finished
    its step and is saved. Ray sees to SIGINT.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def load_ray() -> Any:
    """The package."""
    # Read when Ray is imported; a user's own settings win.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ConfigError(
            "runtime.type = 'ray' needs Ray, which is not installed: pip install 'zotune[ray]' on every node, or use "
            "runtime.type = 'torch'"
        ) from error
    return ray


def _nodes() -> list[dict[str, Any]]:
    """The nodes that are alive."""
    return [node for node in load_ray().nodes() if node["Alive"]]


def _address(node: str) -> str:
    """The address of a node by its id."""
    return next((each["NodeManagerAddress"] for each in _nodes() if each["NodeID"] == node), node)
