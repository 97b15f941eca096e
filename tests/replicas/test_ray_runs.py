"""Whole runs on Ray as users have them: their cluster, their errors, their kills. Each starts processes of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_runs
from tiny_runs import Recorder, assert_same

import zotune
from zotune import config, journal
from zotune.config import Config

pytest.importorskip("ray")

Configure = Callable[..., Config]
PROGRAM = [sys.executable, "-c", "from zotune.cli import main; main()"]
RAY: dict[str, Any] = {"replicas": 2, "address": "local", "unit_tokens": 64}


@pytest.fixture
def configure(tmp_path: Path, tiny_model_folder: Path, sentiment_files: tuple[Path, Path]) -> Configure:
    method = {"preset": "lozo", "directions": 4, "interval": 7}
    return partial(tiny_runs.configure, tmp_path, tiny_model_folder, sentiment_files, method=method)


def program(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    path = run / "journal.jsonl"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else -1


def table(run: Path) -> dict[str, Any]:
    done = subprocess.run([*PROGRAM, "scale", str(run), "--json"], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_a_run_is_scaled_killed_and_resumed_without_a_trace_of_its_processes(
    configure: Configure, tmp_path: Path
) -> None:
    """The driver is killed while two replicas work; then the run goes on in this process, with one."""
    run, file = tmp_path / "run", tmp_path / "run.toml"
    runtime = {"type": "ray", "ray": RAY | {"replicas": 1}}
    file.write_text(config.dump(configure(train={"steps": 1_000_000, "checkpoint_every": 10}, runtime=runtime)))
    driver = program("run", file)
    wait_for(driver, lambda: steps_of(run) > 3)
    second = subprocess.run([*PROGRAM, "resume", str(run)], capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "another process is training" in second.stderr, second.stderr
    subprocess.run([*PROGRAM, "scale", str(run), "--replicas", "2"], check=True, capture_output=True)
    wait_for(driver, lambda: len(_in_step(table(run))) == 2)
    before = steps_of(run)
    wait_for(driver, lambda: steps_of(run) > before + 3)
    family = psutil.Process(driver.pid).children(recursive=True)
    assert len([each for each in _in_step(table(run)) if each["pid"] in [process.pid for process in family]]) == 2
    driver.kill()
    out, errors = driver.communicate()
    assert "Traceback" not in errors + out
    # Replicas go at once; two helpers of Ray's first look for the rest of their cluster for a while.
    _, alive = psutil.wait_procs(family, timeout=180)
    assert not alive, [process.cmdline() for process in alive]

    found = table(run)
    assert (found["live"], found["wanted"]) == (False, 2)
    done = len(journal.read(run / "journal.jsonl").entries)
    zotune.resume(run, Recorder(), steps=done + 5)
    zotune.start(configure(output="undisturbed", train={"steps": done + 5}, runtime=runtime), Recorder())
    assert journal.read(run / "journal.jsonl").entries == journal.read(tmp_path / "undisturbed/journal.jsonl").entries
    assert_same(tiny_runs.saved(run), tiny_runs.saved(tmp_path / "undisturbed"))


def _in_step(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in found.get("replicas", []) if each["state"] == "in step"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_to_all_saves_and_leaves_nothing_behind(
    configure: Configure, tmp_path: Path, number: int, code: int, word: str
) -> None:
    """A terminal or a scheduler sends it to the whole group: cluster and replicas must leave it to the driver."""
    run, file = tmp_path / "run", tmp_path / "run.toml"
    file.write_text(config.dump(configure(train={"steps": 1_000_000}, runtime={"type": "ray", "ray": RAY})))
    driver = program("run", file)
    wait_for(driver, lambda: steps_of(run) > 3)
    family = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, number)
    out, errors = driver.communicate(timeout=120)
    assert driver.returncode == code, errors
    assert errors.splitlines() == [f"{word}; go on with: zotune resume {run}"]
    assert "ray" not in out.lower()
    assert not psutil.wait_procs(family, timeout=60)[1]
    # The embedded runtime goes on from there: the state is the same, whoever computed it.
    assert steps_of(run) == len(journal.read(run / "journal.jsonl").entries)


REFUSED = """
import sys
from pathlib import Path
from zotune import config
from zotune.errors import ConfigError
from zotune.session import Session
for setting in sys.argv[2:]:
    try:
        Session.build(config.load(Path(sys.argv[1]), [setting]))
    except ConfigError as error:
        print(error)
"""


@pytest.mark.slow
def test_what_cannot_be_had_is_named(configure: Configure, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(config.dump(configure(runtime={"type": "ray", "ray": RAY})))
    settings = [f"runtime.ray.{each}" for each in ("address=127.0.0.1:1", "replicas=4096", "gpus=3")]
    words = [sys.executable, "-c", REFUSED, str(file), *settings]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    nowhere, many, gpus = done.stdout.splitlines()
    assert "runtime.ray.address = '127.0.0.1:1': there is no Ray cluster" in nowhere
    cores = len(os.sched_getaffinity(0))
    assert "runtime.ray.replicas = 4096 of 1 CPU each do not fit" in many
    assert f"room for {cores} (node " in many
    assert f": {cores} CPUs, 0 GPUs)" in many
    assert "2 of 1 CPU and 3 GPUs each do not fit" in gpus
    assert "room for 0 (" in gpus


TWO_NODES = """
import sys
from contextlib import closing
from pathlib import Path
from ray.cluster_utils import Cluster as Nodes
from zotune import config
from zotune.journal import Journal
from zotune.run import RunDirectory
from zotune.session import Session
from zotune.train import take_step

nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = nodes.add_node(num_cpus=1)
chosen = config.load(Path(sys.argv[1]), [f"runtime.ray.address={nodes.address}"])
with closing(Session.build(chosen)) as session:
    run = RunDirectory.create(chosen, session.header())
    journal = Journal.open(run.journal)
    journal.claim()
    for step in range(10):
        if step == 3:
            nodes.remove_node(second, allow_graceful=False)
        take_step(session, step, journal)
    print("in step:", *session.runtime.team.members)
    print(*session.runtime.news(), sep=chr(10))
nodes.shutdown()
"""


@pytest.mark.slow
def test_a_node_that_vanishes_leaves_its_units_to_the_others(configure: Configure, tmp_path: Path) -> None:
    """Two nodes of one CPU each, at an address; afterwards there is room for one replica only."""
    file = tmp_path / "run.toml"
    file.write_text(config.dump(configure(train={"steps": 10}, runtime={"type": "ray", "ray": RAY})))
    words = [sys.executable, "-c", TWO_NODES, str(file)]
    # Ray's monitor counts the memory of all programs of a machine, which here may be crowded.
    environment = os.environ | {"RAY_memory_monitor_refresh_ms": "0"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr
    # Ray speaks between the lines.
    assert re.search(r"in step: [01](?! [01])", done.stdout), done.stdout
    assert "is lost: its " in done.stdout
    zotune.start(configure(output="undisturbed", train={"steps": 10}, runtime={"type": "ray", "ray": RAY}), Recorder())
    entries = journal.read(tmp_path / "run" / "journal.jsonl").entries
    assert entries == journal.read(tmp_path / "undisturbed" / "journal.jsonl").entries


def test_without_ray_the_package_is_named(configure: Configure, tmp_path: Path) -> None:
    """In a process that cannot import it."""
    file = tmp_path / "run.toml"
    file.write_text(config.dump(configure(runtime={"type": "ray"})))
    code = "import sys; sys.modules['ray'] = None; from zotune.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "run", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs Ray, which is not installed: pip install 'zotune[ray]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_a_live_run_on_ray_is_scaled(configure: Configure, tmp_path: Path) -> None:
    zotune.start(configure(train={"steps": 1}), Recorder())
    words = [*PROGRAM, "scale", str(tmp_path / "run"), "--replicas", "2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "has no replicas, because its runtime.type is 'torch'" in done.stderr
    file = tmp_path / "run" / "config.toml"
    file.write_text(file.read_text().replace('type = "torch"', 'type = "ray"'))
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not training, so there is nothing to scale" in done.stderr
    assert not (tmp_path / "run" / "scale.json").exists()


FULL = """
import ray
from zotune.config import ReplicasConfig
from zotune.errors import EngineError
from zotune.runtimes.replicas.cluster import Cluster
# Ray goes on on disk when shared memory is full; here it takes a disk for full of which a hundredth is used.
settings = {"local_fs_capacity_threshold": 0.01, "automatic_object_spilling_enabled": False}
quiet = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
ray.init("local", num_cpus=1, object_store_memory=80 * 2**20, _system_config=settings, **quiet)
cluster, kept = Cluster(ReplicasConfig(), cpus=1, shards=1), []
try:
    while True:
        kept.append(cluster.share(bytes(16 * 2**20)))
except EngineError as error:
    print(len(kept), error)
"""


@pytest.mark.slow
def test_a_full_object_store_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=False, timeout=300)
    assert "object store is full" in done.stdout, done.stderr
    assert int(done.stdout.split()[0]) >= 2


@pytest.mark.slow
def test_real_steps_are_timed_beside_what_is_predicted_of_them(
    tiny_model_folder: Path, sentiment_files: tuple[Path, Path], tmp_path: Path
) -> None:
    for file in sentiment_files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [json.dumps({"sentence": row["text"], "label": row["label"]}) for row in rows]
        (tmp_path / file.name).write_text("\n".join(lines))
    options = {"check": "1,2", "model": tiny_model_folder, "data": tmp_path, "dtype": "float32", "repeats": 2}
    words = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run([*PROGRAM, "bench", "cluster", *words, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    one, two = found["measured"]
    assert (one["replicas"], two["replicas"]) == (1, 2)
    assert (one["speedup"], one["at_best"]) == (1.0, 1.0)
    assert two["speedup"] == pytest.approx(one["step_s"] / two["step_s"])
    (units, alone), (same, together) = (each["batches"][1] for each in (one, two))
    assert units == same == found["units"]
    assert two["at_best"] == pytest.approx(min(2, units) * alone / together)
    for each, predicted in zip(found["measured"], found["predicted_s"], strict=True):
        assert each["overhead_s"] < each["step_s"]
        assert predicted > min(seconds for _, seconds in each["batches"]) > 0
        assert each["down_bytes"] < 4096
