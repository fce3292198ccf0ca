"""One Slurm cluster of two nodes on this host for all tests here, and a site's cluster.env that fits it."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_jobs import Cluster, slurm_sandbox


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """node1 and node2, each with 8 GPUs and 8 processors as the scheduler counts them."""
    if lacking := slurm_sandbox.missing():
        pytest.skip(f"Slurm is not installed ({', '.join(lacking)}): `make slurm-deps` as root")
    # Its path is short, since sockets are made below it; pytest's own folders are not.
    folder = Path(tempfile.mkdtemp(prefix="sb-"))
    sandbox = slurm_sandbox.start_sandbox(folder / "box")
    try:
        yield Cluster(sandbox)
    finally:
        slurm_sandbox.stop_sandbox(sandbox)
        shutil.rmtree(folder)


@pytest.fixture
def whole(cluster) -> Iterator[Cluster]:
    """The cluster with all its nodes up and nothing on them, before and after."""
    cluster.mend()
    yield cluster
    cluster.mend()
