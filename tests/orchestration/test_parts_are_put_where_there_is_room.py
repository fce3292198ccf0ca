"""Ranks fill nodes in order, engines get what is left or nodes of their own, and what does not fit is said; those of a lost
node go to where there is room."""

import pytest

from megatron_vespo.config import ClusterConfig, ConfigError
from megatron_vespo.errors import RunError
from megatron_vespo.orchestration.placement import Placement, place, place_again

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


SPLIT = ClusterConfig(policy_nodes=2, engine_nodes=2)


def test_engines_of_a_lost_node_go_to_gpus_that_are_free_on_nodes_for_engines():
    # Nodes 2 and 3 have 8 GPUs: 4 are free on node 2, and node 1 has free ones too, which are not for engines first.
    placed = Placement([0] * 8 + [1] * 4, [2, 3, 3])
    again = place_again(SPLIT, EIGHT, 2, placed, {3})
    assert again == Placement(placed.ranks, [2, 2, 2])


def test_an_engine_takes_what_the_trainer_leaves_where_no_node_for_engines_has_room():
    placed = Placement([0] * 8 + [1] * 4, [2, 2, 3, 3])
    again = place_again(SPLIT, EIGHT, 4, placed, {3})
    assert again == Placement(placed.ranks, [2, 2, 1, None])
    assert place_again(SPLIT, EIGHT, 4, again, {2, 3}) == Placement(placed.ranks, [None, None, 1, None])


def test_without_gpus_engines_go_to_the_nodes_with_fewest_parts():
    placed = Placement([0, 0, 1, 1], [2, 3, 3])
    assert place_again(SPLIT, [0] * 4, 0, placed, {3}).engines == [2, 2, 2]
    assert place_again(ClusterConfig(), [0] * 4, 0, placed, {2}).engines == [0, 3, 3]
    assert place_again(SPLIT, [0] * 4, 0, placed, {2, 3}).engines == [0, 1, 0]


def test_ranks_move_together_to_their_own_nodes_and_then_to_free_gpus_elsewhere():
    placed = Placement([0] * 6 + [1] * 6, [2, 3])
    assert place_again(SPLIT, EIGHT, 2, placed, {1}) == Placement([0] * 8 + [2] * 4, [2, 3])
    without = place_again(SPLIT, [0] * 4, 0, Placement([0, 0, 1, 1], [2, 3]), {1})
    assert without == Placement([0] * 4, [2, 3])


def test_ranks_come_before_engines_of_the_same_node():
    placed = Placement([0] * 4 + [1] * 4, [1, 1])
    assert place_again(ClusterConfig(), [8, 8], 2, placed, {1}) == Placement([0] * 8, [None, None])


def test_a_trainer_without_room_says_how_many_ranks_would_fit():
    placed = Placement([0] * 8 + [1] * 8, [2, 3])
    with pytest.raises(RunError, match=r"policy.ranks: 16 .*\[8, 2, 2\] GPUs free: at most policy.ranks=12"):
        place_again(SPLIT, EIGHT, 6, placed, {1})
