"""Ranks fill nodes in order, engines get what is left or nodes of their own, and what does not fit is said."""

import pytest

from megatron_vespo.config import ClusterConfig, ConfigError
from megatron_vespo.orchestration.placement import place

EIGHT = [8, 8, 8, 8]


def test_ranks_and_engines_get_nodes_of_their_own():
    placed = place(ClusterConfig(policy_nodes=2, engine_nodes=2), EIGHT, ranks=16, engines=6, engine_gpus=2)
    assert placed.ranks == [0] * 8 + [1] * 8
    assert placed.engines == [2, 2, 2, 2, 3, 3]


def test_without_a_split_engines_get_what_the_trainer_leaves():
    placed = place(ClusterConfig(), [8, 8], ranks=10, engines=2, engine_gpus=2)
    assert placed.ranks == [0] * 8 + [1, 1]
    assert placed.engines == [1, 1]


def test_an_engine_lies_on_one_node():
    # 3 GPUs are left on each node, 6 together: room for no engine of 4.
    with pytest.raises(
        ConfigError, match=r"rollout.engine.count: 1 with 4 GPUs each, .*\[3, 3\] GPUs free.* room for 0"
    ):
        place(ClusterConfig(policy_nodes=1, engine_nodes=2), [8, 3, 3], ranks=8, engines=1, engine_gpus=4)


def test_a_trainer_that_is_too_large_is_refused():
    with pytest.raises(ConfigError, match=r"policy.ranks: 9 with 1 GPU each, but the 1 nodes"):
        place(ClusterConfig(policy_nodes=1, engine_nodes=1), [8, 8], ranks=9, engines=1, engine_gpus=1)


def test_without_gpus_neighbours_stay_together():
    placed = place(ClusterConfig(), [0, 0], ranks=4, engines=2, engine_gpus=0)
    assert placed.ranks == [0, 0, 1, 1] and placed.engines == [0, 1]
    apart = place(ClusterConfig(policy_nodes=1, engine_nodes=1), [0, 0], ranks=2, engines=1, engine_gpus=0)
    assert apart.ranks == [0, 0] and apart.engines == [1]


def test_a_split_needs_its_nodes():
    with pytest.raises(ConfigError, match="ask for 3 nodes, this run has 1"):
        place(ClusterConfig(policy_nodes=2, engine_nodes=1), [8], ranks=1, engines=1, engine_gpus=1)
