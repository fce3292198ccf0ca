"""Slurm clusters on this host for all tests here, and a site's cluster.env that fits them."""

from collections.abc import Iterator

import pytest
from cluster_jobs import Cluster, running_cluster
from training_jobs import without_a_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """node1 and node2."""
    with running_cluster(2) as cluster:
        yield cluster


@pytest.fixture
def whole(cluster) -> Iterator[Cluster]:
    """The cluster with all its nodes up and nothing on them, before and after."""
    cluster.mend()
    yield cluster
    cluster.mend()


@pytest.fixture(scope="module")
def three() -> Iterator[Cluster]:
    """A cluster of three nodes."""
    with running_cluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def large() -> Iterator[Cluster]:
    """A cluster of eight nodes."""
    with running_cluster(8) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def alone(tmp_path_factory) -> list[dict]:
    """Figures of the run of all training jobs here, on this host alone."""
    return without_a_cluster(tmp_path_factory.mktemp("alone"))
