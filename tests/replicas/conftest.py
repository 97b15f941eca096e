from __future__ import annotations

from collections.abc import Iterator

import pytest

ray = pytest.importorskip("ray")


@pytest.fixture(scope="session", autouse=True)
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this test process alone, with room for more replicas than there are cores."""
    from zotune.runtimes.replicas import cluster

    cluster.load_ray()
    quiet = {"logging_level": "ERROR", "log_to_driver": False, "include_dashboard": False}
    ray.init(address="local", num_cpus=12, object_store_memory=128 * 2**20, **quiet)
    yield
    ray.shutdown()
