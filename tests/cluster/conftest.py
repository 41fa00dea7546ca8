"""One cluster for all tests of this folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, absent


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    """The daemons; skips where the machine has none."""
    reason = absent()
    if reason:
        pytest.skip(reason)
    root = Path(
        tempfile.mkdtemp(prefix="fd-slurm-")
    )  # a short path: the kernel allows a socket 107 characters
    cluster = Cluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root)


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """A two-node Slurm without jobs; those of the test end with it."""
    yield running_cluster
    running_cluster.clear()
