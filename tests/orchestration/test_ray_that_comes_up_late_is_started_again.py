"""On a host so slow that Ray's node is not registered within Ray's 30 s, Ray is started again."""

import asyncio
import time

import psutil
import pytest
import ray
from ray._private import services

from megatron_vespo.interface import LOOPBACK
from megatron_vespo.orchestration.cluster import LocalCluster


@pytest.mark.slow
def test_the_second_start_serves_and_nothing_of_the_first_is_left(monkeypatch):
    get_node, starts = services.get_node, []

    def not_at_first(address, node):
        if node not in starts:
            starts.append(node)
        if len(starts) == 1:
            time.sleep(0.5)
            raise RuntimeError("no such node yet")
        return get_node(address, node)

    monkeypatch.setattr(services, "get_node", not_at_first)
    cluster = LocalCluster(1, LOOPBACK)
    asyncio.run(cluster.start())
    try:
        assert len(starts) == 2
        assert ray.get(ray.remote(lambda: 6 * 7).remote()) == 42
        raylets = [child for child in psutil.Process().children(recursive=True) if child.name() == "raylet"]
        assert len([raylet for raylet in raylets if raylet.status() != psutil.STATUS_ZOMBIE]) == 1
    finally:
        cluster.stop()
