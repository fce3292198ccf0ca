"""From graded groups to what the trainer takes: advantages, and sequences whose labels are the response tokens."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vespo.config import AdvantageConfig, AlgorithmConfig, RolloutConfig
from megatron_vespo.config.algorithm import OldPolicy
from megatron_vespo.objective.advantages import advantages, trained_groups, without_variance
from megatron_vespo.objective.kl import kl_penalty
from megatron_vespo.objective.overlong import overlong_penalty
from megatron_vespo.packing.batch import TrainingSequence
from megatron_vespo.packing.steps import PackingReport
from megatron_vespo.policy.result import TokenScores
from megatron_vespo.rollout.trajectory import Group, Trajectory


def settle_truncated(groups: list[Group], rollout: RolloutConfig) -> None:
    """Apply `rollout.truncated` to responses that were cut off, in place, after grading and before advantages."""
    for trajectory in (t for group in groups for t in group.trajectories if t.truncated):
        if rollout.truncated == "mask":
            trajectory.trained = False
        elif rollout.truncated == "penalise":
            trajectory.reward -= rollout.truncation_penalty


def rewards_of(groups: list[Group]) -> NDArray[np.float64]:
    """[groups, G], as they are now."""
    return np.array([[trajectory.reward for trajectory in group.trajectories] for group in groups], dtype=np.float64)


def first_with_variance(groups: list[Group], count: int) -> list[Group]:
    """`count` of these groups in their order; those whose rewards are all equal only where the others are too few."""
    without = without_variance(rewards_of(groups))
    chosen = sorted(sorted(range(len(groups)), key=lambda index: without[index])[:count])
    return [groups[index] for index in chosen]


def mark_trained(groups: list[Group], config: AdvantageConfig) -> None:
    """In place, those that the algorithm leaves out. By the task's rewards: call it before `shape_rewards`, after which
    hardly two rewards are equal."""
    for group, trained in zip(groups, trained_groups(rewards_of(groups), config), strict=True):
        group.trained = bool(trained)


def shape_rewards(groups: list[Group], algorithm: AlgorithmConfig, max_response_tokens: int) -> None:
    """Take off what the algorithm adds to the task's own reward: overlong responses, KL to the reference; in place."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    if algorithm.overlong_shaping is not None:
        lengths = np.array([len(trajectory.response_ids) for trajectory in trajectories])
        penalties = overlong_penalty(lengths, max_response_tokens, algorithm.overlong_shaping)
        _take_off(trajectories, penalties)
    kl = algorithm.objective.kl
    if kl.place == "reward" and kl.coefficient > 0:
        log_probs, reference = (
            torch.from_numpy(np.concatenate([t.log_probs_of(policy) for t in trajectories]))
            for policy in (algorithm.old_policy, "reference")
        )
        penalties = kl_penalty(kl, log_probs, reference, sampled_tokens(trajectories), response_bounds(trajectories))
        _take_off(trajectories, penalties.numpy())


def _take_off(trajectories: list[Trajectory], penalties: NDArray[np.float64]) -> None:
    for trajectory, penalty in zip(trajectories, penalties, strict=True):
        trajectory.reward -= float(penalty)


def response_bounds(trajectories: list[Trajectory]) -> Tensor:
    """Where responses begin and end when they are put behind each other: [n + 1] int32."""
    return torch.tensor([0, *np.cumsum([len(t.response_ids) for t in trajectories])], dtype=torch.int32)


def sampled_tokens(trajectories: list[Trajectory]) -> Tensor:
    """Which tokens of responses that are put behind each other the engine sampled: [response tokens of all] bool."""
    return torch.from_numpy(np.concatenate([t.sampled for t in trajectories]))


def response_log_probs(trajectory: Trajectory, scores: TokenScores) -> NDArray[np.float32]:
    """[positions] -> [response tokens]: the last prompt token predicts the first of the response. 0 on what was not
    sampled."""
    own = scores.log_probs[len(trajectory.prompt.token_ids) - 1 :].numpy()
    return np.where(trajectory.sampled, own, np.float32(0))


def assign_advantages(groups: list[Group], config: AdvantageConfig) -> None:
    """In place, of the rewards as they are now; also to groups that are left out, which the estimator may look at."""
    for group, row in zip(groups, advantages(rewards_of(groups), config), strict=True):
        for trajectory, advantage in zip(group.trajectories, row, strict=True):
            trajectory.advantage = float(advantage)


def mini_batches(groups: list[Group], groups_per_step: int) -> Iterator[list[Trajectory]]:
    """Whole groups, in the order given, without those that are left out. A step needs some, though: where all would be
    left out all stay, with advantages of 0."""
    for start in range(0, len(groups), groups_per_step):
        step = groups[start : start + groups_per_step]
        trained = [group for group in step if group.trained] or step
        yield [trajectory for group in trained for trajectory in group.trajectories]


def training_sequences(trajectories: list[Trajectory], old_policy: OldPolicy) -> list[TrainingSequence]:
    """With P prompt and R response tokens, position P - 1 + j predicts response token j."""
    return [_sequence(trajectory, old_policy, key) for key, trajectory in enumerate(trajectories)]


def _sequence(trajectory: Trajectory, old_policy: OldPolicy, key: int) -> TrainingSequence:
    prompt, response = trajectory.prompt.token_ids, trajectory.response_ids

    def placed(values: NDArray) -> NDArray:
        """[response tokens] -> [positions], 0 on those of the prompt."""
        return np.concatenate([np.zeros(len(prompt) - 1, dtype=values.dtype), values])

    engine, reference = trajectory.engine_log_weights, trajectory.reference_log_probs
    return TrainingSequence(
        token_ids=np.concatenate([prompt, response]).astype(np.int32),
        label_mask=placed(trajectory.sampled) & trajectory.trained,
        old_log_probs=placed(trajectory.log_probs_of(old_policy)),
        advantage=trajectory.advantage,
        key=key,
        engine_log_weights=None if engine is None else placed(engine),
        reference_log_probs=None if reference is None else placed(reference),
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
