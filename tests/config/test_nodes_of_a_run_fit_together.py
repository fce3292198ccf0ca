"""Settings of the hosts that contradict each other are named before a job has started anything."""

import pytest

from megatron_vespo.config import ConfigError, TrainConfig, load_config

CONFIG = "examples/quickstart.yaml"
JOB = ("cluster.ray=192.0.2.1:20000", "cluster.ray_token=/tmp/token")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("cluster.ray=nowhere",), "cluster.ray: 'nowhere' is neither 'local' nor ADDRESS:PORT"),
        (JOB[:1], "cluster.ray_token: belongs to a Ray that a job started"),
        (JOB[1:], "cluster.ray_token: belongs to a Ray that a job started"),
        (("cluster.policy_nodes=1",), "cluster.policy_nodes: goes together with cluster.engine_nodes"),
        (
            (*JOB, "cluster.node_names=[a, b]", "cluster.policy_nodes=2", "cluster.engine_nodes=1"),
            "cluster.policy_nodes: 2 nodes for the trainer and 1 for engines are 3, but the job has 2",
        ),
    ],
)
def test_a_contradiction_is_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, CONFIG, list(overrides))


def test_what_a_job_fills_in_is_taken():
    overrides = [*JOB, "cluster.node_names=[a, b]", "cluster.policy_nodes=1", "cluster.engine_nodes=1"]
    assert load_config(TrainConfig, CONFIG, overrides).cluster.node_names == ("a", "b")
