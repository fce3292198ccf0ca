"""The way from trajectories to the trainer, against naive loops: an error of one position would train nonsense."""

import numpy as np
import pytest

from megatron_vespo.config import AdvantageConfig, RolloutConfig
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.orchestration.gradient_noise import in_parts
from megatron_vespo.orchestration.mini_batches import (
    assign_advantages,
    first_with_variance,
    mini_batches,
    settle_truncated,
    training_sequences,
)
from megatron_vespo.rollout.trajectory import Group, Segment, Trajectory


def trajectory(prompt_tokens, response, sample=0, reward=0.0, finish="stop", name="p"):
    prompt = Prompt(name, "text", np.array(prompt_tokens, dtype=np.int32), 0, None)
    return Trajectory(
        prompt,
        sample,
        np.array(response, dtype=np.int32),
        np.array([-0.01 * token for token in response], dtype=np.float32),
        [Segment(0, len(response), 0, "r")],
        finish,
        reward=reward,
        advantage=1.0,
    )


@pytest.mark.parametrize(("prompt", "response"), [([7, 8, 9], [20, 21, 22, 1]), ([5], [30]), ([5, 6], [40, 41])])
def test_each_label_is_the_response_token_that_its_log_prob_is_of(prompt, response):
    (sequence,) = training_sequences([trajectory(prompt, response)], "behavior")
    whole = prompt + response
    assert sequence.token_ids.tolist() == whole
    trained = []
    for position in range(len(whole) - 1):
        label = whole[position + 1]
        is_response = position + 1 >= len(prompt)
        assert bool(sequence.label_mask[position]) == is_response
        if is_response:
            assert sequence.old_log_probs[position] == np.float32(-0.01 * label)
            trained.append(label)
    assert trained == response  # the stop token included


def test_what_an_environment_said_is_input_and_never_a_label():
    conversation = trajectory([7, 8], [20, 1, 50, 51, 21, 1])
    conversation.sampled = np.array([True, True, False, False, True, True])
    (sequence,) = training_sequences([conversation], "behavior")
    assert sequence.token_ids.tolist() == [7, 8, 20, 1, 50, 51, 21, 1]
    labels = [sequence.token_ids[i + 1] for i in range(7) if sequence.label_mask[i]]
    assert labels == [20, 1, 21, 1]


def groups():
    return [
        Group(t[0].prompt, t)
        for t in (
            [trajectory([1], [2, 3], sample=s, reward=r, finish=f, name=f"p{g}") for s, (r, f) in enumerate(rows)]
            for g, rows in enumerate(
                [[(1.0, "stop"), (0.0, "length")], [(0.5, "stop"), (0.5, "stop")], [(0.0, "stop"), (1.0, "length")]]
            )
        )
    ]


def test_mini_batches_hold_whole_groups_in_order():
    batches = list(mini_batches(groups(), 1))
    assert [[t.prompt.identity for t in batch] for batch in batches] == [["p0"] * 2, ["p1"] * 2, ["p2"] * 2]
    assert [len(batch) for batch in mini_batches(groups(), 2)] == [4, 2]


def test_advantages_go_to_the_trajectories_whose_rewards_made_them():
    some = groups()
    assign_advantages(some, AdvantageConfig(std_ddof=0))
    signs = [[np.sign(t.advantage) for t in group.trajectories] for group in some]
    assert signs == [[1, -1], [0, 0], [-1, 1]]


@pytest.mark.parametrize(("count", "chosen"), [(1, ["p0"]), (2, ["p0", "p2"]), (3, ["p0", "p1", "p2"])])
def test_the_first_groups_with_variance_are_chosen_in_their_order(count, chosen):
    assert [group.prompt.identity for group in first_with_variance(groups(), count)] == chosen


@pytest.mark.parametrize(
    ("mode", "rewards", "trained"),
    [("keep", [0.0, 1.0], [True, True]), ("mask", [0.0, 1.0], [False, False]), ("penalise", [-0.5, 0.5], [True, True])],
)
def test_truncated_responses_are_kept_masked_or_penalised(mode, rewards, trained):
    some = groups()
    settle_truncated(some, RolloutConfig(truncated=mode, truncation_penalty=0.5))
    cut = [t for group in some for t in group.trajectories if t.truncated]
    whole = [t for group in some for t in group.trajectories if not t.truncated]
    assert [t.reward for t in cut] == rewards and [t.trained for t in cut] == trained
    assert [t.reward for t in whole] == [1.0, 0.5, 0.5, 0.0] and all(t.trained for t in whole)
    masks = [sequence.label_mask.any() for sequence in training_sequences(cut, "behavior")]
    assert masks == trained


@pytest.mark.parametrize(
    ("groups", "sizes"), [(2, [1, 1]), (8, [1] * 8), (12, [1, 2, 1, 2, 1, 2, 1, 2]), (16, [2] * 8)]
)
def test_parts_of_a_step_are_whole_groups(groups, sizes):
    trajectories = [(group, sample) for group in range(groups) for sample in range(3)]
    parts = in_parts(trajectories, group_size=3)
    assert [len(part) // 3 for part in parts] == sizes
    assert [trajectory for part in parts for trajectory in part] == trajectories
