"""Opt-in measurement of a step's gradient variance: the gradients of parts of the step, before it is taken."""

from itertools import pairwise

from megatron_vespo.objective.gradient_variance import gradient_variance
from megatron_vespo.orchestration.mini_batches import training_sequences
from megatron_vespo.orchestration.session import Session
from megatron_vespo.policy.result import StepResult
from megatron_vespo.rollout.trajectory import Trajectory

PARTS = 8
"""At most. More make the estimate better and the passes smaller."""

PartNorms = list[tuple[float, float]]


async def measure_parts(session: Session, trajectories: list[Trajectory], step: int) -> PartNorms:
    """Gradient norms and denominators of parts of step `step`, under the weights before it; empty if none is due."""
    algorithm, group_size = session.config.algorithm, session.config.rollout.group_size
    every, groups = algorithm.gradient_variance_every, len(trajectories) // group_size
    if every == 0 or step % every or groups < 2:
        return []
    bounds = [group_size * (groups * part // min(PARTS, groups)) for part in range(min(PARTS, groups) + 1)]
    parts = [trajectories[start:end] for start, end in pairwise(bounds)]
    return [
        await session.policy.gradient_norm(training_sequences(part, algorithm.old_policy), algorithm.objective)
        for part in parts
    ]


def gradient_noise(parts: PartNorms, step: StepResult) -> dict[str, float]:
    """For the metrics of the step; nothing if `parts` were not measured."""
    return gradient_variance(parts, step.gradient_norm, step.denominator) if parts else {}
