"""What the trainer says of a rollout batch before the first of its steps: proximal and reference log-probs."""

import numpy as np
import torch

from megatron_vespo.config import ObjectiveConfig
from megatron_vespo.objective.engine_correction import engine_log_weights
from megatron_vespo.objective.metrics import measured_difference
from megatron_vespo.orchestration.mini_batches import (
    response_bounds,
    response_log_probs,
    sampled_tokens,
    training_sequences,
)
from megatron_vespo.orchestration.session import Session
from megatron_vespo.orchestration.step_routes import step_routes
from megatron_vespo.packing.batch import TrainingSequence
from megatron_vespo.policy.result import TokenScores
from megatron_vespo.rollout.trajectory import Group, Trajectory


async def rescore(session: Session, groups: list[Group]) -> None:
    """Fill in, in place, what the algorithm needs beside behavior log-probs; a forward pass for each, none for nothing.

    Call it before the first of the batch's steps: proximal log-probs are those of the weights that the engine holds.
    """
    config = session.config
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    sequences = training_sequences(trajectories, "behavior")
    if config.algorithm.old_policy == "proximal" or config.routing.replay == "R2":
        session.console.phase("scoring: proximal")
        scores = await _proximal(session, trajectories, sequences)
        if config.algorithm.old_policy == "proximal":
            for trajectory, score in zip(trajectories, scores, strict=True):
                trajectory.proximal_log_probs = response_log_probs(trajectory, score)
            correct_engine(trajectories, config.algorithm.objective)
    if config.policy.reference is not None:
        session.console.phase("scoring: reference")
        scores = await session.policy.score(sequences, reference=True)
        for trajectory, score in zip(trajectories, scores, strict=True):
            trajectory.reference_log_probs = response_log_probs(trajectory, score)


async def _proximal(
    session: Session, trajectories: list[Trajectory], sequences: list[TrainingSequence]
) -> list[TokenScores]:
    """Under R3 with the engine's routes, as in the steps that follow; under R2 the trainer's own are recorded here."""
    if session.config.routing.replay == "R2":
        scores, routes = await session.policy.score_and_record(sequences, session.progress.step)
        for trajectory, own in zip(trajectories, routes, strict=True):
            trajectory.proximal_routes = own
        return scores
    routes = step_routes(trajectories, session.config.routing, measure=False)
    return await session.policy.score(sequences, routes=routes)


def correct_engine(trajectories: list[Trajectory], objective: ObjectiveConfig) -> None:
    """Assign `engine_log_weights`, in place, if the objective corrects for the engine."""
    if objective.engine_correction.name == "none":
        return
    proximal, behavior = (
        torch.from_numpy(np.concatenate([t.log_probs_of(policy) for t in trajectories]))
        for policy in ("proximal", "behavior")
    )
    bounds = response_bounds(trajectories)
    sampled = sampled_tokens(trajectories)
    weights = engine_log_weights(objective.engine_correction, proximal, behavior, sampled, bounds)
    for trajectory, own in zip(trajectories, weights.float().split(bounds.diff().tolist()), strict=True):
        trajectory.engine_log_weights = own.numpy()


def engine_mismatch(trajectories: list[Trajectory]) -> tuple[dict[str, float], float]:
    """How far proximal log-probs are from the engine's, which sampled under the same weights.

    Returns:
        `metrics.measured_difference` over all tokens that the engine sampled, and the standard deviation over trajectories of the sum
        over the response of log(proximal / behavior).
    """
    proximal, behavior = (
        torch.from_numpy(np.concatenate([t.log_probs_of(policy) for t in trajectories]))
        for policy in ("proximal", "behavior")
    )
    sums = measured_difference(proximal, behavior, sampled_tokens(trajectories))
    log_weights = [float((t.log_probs_of("proximal") - t.behavior_log_probs).sum()) for t in trajectories]
    return {name: float(value) for name, value in sums.items()}, float(np.std(log_weights))
