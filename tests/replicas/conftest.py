from __future__ import annotations

from collections.abc import Iterator

import pytest

ray = pytest.importorskip("ray")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this test process alone, with room for more replicas than there are cores."""
    from zotune.runtimes.replicas import cluster

    cluster.start_local(cpus=12)
    yield
    ray.shutdown()
