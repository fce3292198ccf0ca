"""Opt-in measurement of a step's gradient variance: the gradients of parts of the step, before it is taken."""

from itertools import pairwise
from typing import TypeVar

from megatron_vespo.objective.gradient_variance import gradient_variance
from megatron_vespo.orchestration.mini_batches import training_sequences
from megatron_vespo.orchestration.session import Session
from megatron_vespo.orchestration.step_routes import step_routes
from megatron_vespo.policy.result import StepResult
from megatron_vespo.rollout.trajectory import Trajectory

PARTS = 8
"""At most. More make the estimate better and the passes smaller."""

T = TypeVar("T")
PartNorms = list[tuple[float, float]]


async def measure_parts(session: Session, trajectories: list[Trajectory], step: int) -> PartNorms:
    """Gradient norms and denominators of parts of step `step`, under the weights before it; empty if none is due."""
    algorithm, group_size = session.config.algorithm, session.config.rollout.group_size
    every, groups = algorithm.gradient_variance_every, len(trajectories) // group_size
    if every == 0 or step % every or groups < 2:
        return []
    return [
        await session.policy.gradient_norm(
            training_sequences(part, algorithm.old_policy),
            algorithm.objective,
            step_routes(part, session.config.routing, measure=False),
        )
        for part in in_parts(trajectories, group_size)
    ]


def in_parts(trajectories: list[T], group_size: int) -> list[list[T]]:
    """Whole groups, in at most PARTS parts of nearly equal numbers."""
    groups = len(trajectories) // group_size
    count = min(PARTS, groups)
    bounds = [group_size * (groups * part // count) for part in range(count + 1)]
    return [trajectories[start:end] for start, end in pairwise(bounds)]


def gradient_noise(parts: PartNorms, step: StepResult) -> dict[str, float]:
    """For the metrics of the step; nothing if `parts` were not measured."""
    return gradient_variance(parts, step.gradient_norm, step.denominator) if parts else {}
