"""From graded groups to what the trainer takes: advantages, and sequences whose labels are the response tokens."""

from collections.abc import Iterator

import numpy as np

from megatron_vespo.config import AdvantageConfig, RolloutConfig
from megatron_vespo.objective.advantages import advantages
from megatron_vespo.policy.batch import TrainingSequence
from megatron_vespo.policy.packing import PackingReport
from megatron_vespo.rollout.trajectory import Group, Trajectory


def settle_truncated(groups: list[Group], rollout: RolloutConfig) -> None:
    """Apply `rollout.truncated` to responses that were cut off, in place, after grading and before advantages."""
    for trajectory in (t for group in groups for t in group.trajectories if t.truncated):
        if rollout.truncated == "mask":
            trajectory.trained = False
        elif rollout.truncated == "penalise":
            trajectory.reward -= rollout.truncation_penalty


def assign_advantages(groups: list[Group], config: AdvantageConfig) -> None:
    rewards = np.array([[trajectory.reward for trajectory in group.trajectories] for group in groups])
    for group, row in zip(groups, advantages(rewards, config), strict=True):
        for trajectory, advantage in zip(group.trajectories, row, strict=True):
            trajectory.advantage = float(advantage)


def mini_batches(groups: list[Group], groups_per_step: int) -> Iterator[list[Trajectory]]:
    """Whole groups, in the order given."""
    for start in range(0, len(groups), groups_per_step):
        yield [t for group in groups[start : start + groups_per_step] for t in group.trajectories]


def training_sequences(trajectories: list[Trajectory]) -> list[TrainingSequence]:
    """With P prompt and R response tokens, position P - 1 + j predicts response token j."""
    return [_sequence(trajectory, key) for key, trajectory in enumerate(trajectories)]


def _sequence(trajectory: Trajectory, key: int) -> TrainingSequence:
    prompt, response = trajectory.prompt.token_ids, trajectory.response_ids
    positions = len(prompt) + len(response) - 1
    predicts_response = np.arange(positions) >= len(prompt) - 1
    old_log_probs = np.zeros(positions, dtype=np.float32)
    old_log_probs[predicts_response] = trajectory.behavior_log_probs
    return TrainingSequence(
        token_ids=np.concatenate([prompt, response]).astype(np.int32),
        label_mask=predicts_response & trajectory.trained,
        old_log_probs=old_log_probs,
        advantage=trajectory.advantage,
        key=key,
    )


def packing_figures(report: PackingReport) -> dict[str, float]:
    """For the metrics of a step."""
    return {
        "packing/micro_batches": report.micro_batches,
        "packing/fill": report.fill,
        "packing/padding_share": 1 - report.real_positions / report.positions,
        "packing/rank_balance": report.rank_balance,
        "packing/step_balance": report.step_balance,
    }
