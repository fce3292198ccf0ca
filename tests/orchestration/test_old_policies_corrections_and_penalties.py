"""What stands between sampling and training, token by token, against plain loops."""

import math

import numpy as np
import pytest
from test_labels_and_advantages_meet_their_tokens import trajectory

from megatron_vespo.config import AdvantageConfig, AlgorithmConfig, ObjectiveConfig
from megatron_vespo.orchestration.mini_batches import (
    assign_advantages,
    mark_trained,
    mini_batches,
    shape_rewards,
    training_sequences,
)
from megatron_vespo.orchestration.rescoring import correct_engine, engine_mismatch
from megatron_vespo.rollout.trajectory import Group

RESPONSES = ([20, 21, 22], [30], [40, 41])


def scored():
    """Trajectories whose proximal and reference log-probs differ from behavior's by known amounts."""
    made = []
    for number, response in enumerate(RESPONSES):
        one = trajectory([5, 6], response, sample=number, reward=1.0)
        steps = np.arange(len(response), dtype=np.float32)
        one.proximal_log_probs = one.behavior_log_probs + 0.3 * steps
        one.reference_log_probs = one.behavior_log_probs - 0.1 * (steps + 1)
        made.append(one)
    return made


def algorithm(**settings):
    return AlgorithmConfig.model_validate({"steps": 4, "prompts_per_step": 1} | settings)


@pytest.mark.parametrize("old_policy", ["behavior", "proximal"])
def test_the_old_policy_is_the_one_that_was_asked_for(old_policy):
    trajectories = scored()
    for sequence, one in zip(training_sequences(trajectories, old_policy), trajectories, strict=True):
        expected = one.proximal_log_probs if old_policy == "proximal" else one.behavior_log_probs
        assert sequence.old_log_probs.tolist() == [0.0, *expected.tolist()]
        assert sequence.reference_log_probs.tolist() == [0.0, *one.reference_log_probs.tolist()]
        assert sequence.engine_log_weights is None


def test_scores_that_were_never_computed_are_named():
    with pytest.raises(ValueError, match="p, sample 0: no proximal log-probs"):
        training_sequences([trajectory([5], [6, 7])], "proximal")


def test_engine_corrections_meet_their_tokens():
    trajectories = scored()
    correct_engine(trajectories, ObjectiveConfig.model_validate({"engine_correction": {"name": "tis", "cap": 1.5}}))
    for one in trajectories:
        expected = [min(0.3 * j, math.log(1.5)) for j in range(len(one.response_ids))]
        assert one.engine_log_weights.tolist() == pytest.approx(expected, abs=1e-6)
    untouched = scored()
    correct_engine(untouched, ObjectiveConfig())
    assert all(one.engine_log_weights is None for one in untouched)


def test_the_engines_mismatch_is_measured_against_the_proximal_policy():
    trajectories = scored()
    sums, spread = engine_mismatch(trajectories)
    differences = [[0.3 * j for j in range(len(response))] for response in RESPONSES]
    flat = [d for row in differences for d in row]
    assert sums["tokens"] == len(flat)
    assert sums["abs_difference"] == pytest.approx(sum(flat), abs=1e-5)
    assert sums["k3"] == pytest.approx(sum(math.exp(d) - 1 - d for d in flat), abs=1e-5)
    assert spread == pytest.approx(np.std([sum(row) for row in differences]), abs=1e-5)


@pytest.mark.parametrize("old_policy", ["behavior", "proximal"])
def test_kl_as_a_reward_is_taken_off_each_response(old_policy):
    kl = {"coefficient": 0.5, "estimator": "k1", "place": "reward"}
    groups = [Group(one.prompt, [one]) for one in scored()]
    shape_rewards(groups, algorithm(old_policy=old_policy, objective={"kl": kl}), max_response_tokens=8)
    for group in groups:
        one = group.trajectories[0]
        policy = one.behavior_log_probs if old_policy == "behavior" else one.proximal_log_probs
        divergence = sum(float(a) - float(b) for a, b in zip(policy, one.reference_log_probs, strict=True))
        assert one.reward == pytest.approx(1.0 - 0.5 * divergence, abs=1e-6)


def test_long_responses_lose_reward():
    groups = [Group(one.prompt, [one]) for one in scored()]
    shape_rewards(groups, algorithm(overlong_shaping={"buffer_tokens": 2, "penalty": 0.4}), max_response_tokens=3)
    assert [g.trajectories[0].reward for g in groups] == pytest.approx([0.6, 1.0, 0.8])


def test_groups_all_alike_are_left_out_unless_nothing_would_remain():
    def group(name, rewards):
        members = [trajectory([1], [2], sample=s, reward=r, name=name) for s, r in enumerate(rewards)]
        return Group(members[0].prompt, members)

    groups = [group("a", [1, 0]), group("b", [1, 1]), group("c", [0, 0]), group("d", [1, 1])]
    mark_trained(groups, AdvantageConfig(zero_variance_groups="filter"))
    assign_advantages(groups, AdvantageConfig(zero_variance_groups="filter"))
    names = [[t.prompt.identity for t in batch] for batch in mini_batches(groups, 2)]
    assert names == [["a", "a"], ["c", "c", "d", "d"]]
    assert all(t.advantage == 0 for g in groups[1:] for t in g.trajectories)
    mark_trained(groups, AdvantageConfig())
    assert [len(batch) for batch in mini_batches(groups, 2)] == [4, 4]
