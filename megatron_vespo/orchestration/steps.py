"""What both loops are made of: an optimizer step and what it tells, weights to the engines, an evaluation."""

import time

import numpy as np

from megatron_vespo.errors import RunError
from megatron_vespo.objective.diagnostics import (
    difference_diagnostics,
    token_diagnostics,
    weight_diagnostics,
)
from megatron_vespo.objective.kernels import largest_coefficient
from megatron_vespo.orchestration.engine_weights import send_weights
from megatron_vespo.orchestration.evaluation import evaluate
from megatron_vespo.orchestration.gradient_noise import gradient_noise, measure_parts
from megatron_vespo.orchestration.mini_batches import packing_figures, training_sequences
from megatron_vespo.orchestration.mismatch import mismatch_figures
from megatron_vespo.orchestration.rescoring import engine_mismatch
from megatron_vespo.orchestration.routing_probe import probe_engine_routes
from megatron_vespo.orchestration.session import Session
from megatron_vespo.orchestration.step_routes import by_layer, routing_figures, step_routes
from megatron_vespo.policy.result import StepResult
from megatron_vespo.rollout.trajectory import Trajectory


async def train_step(session: Session, trajectories: list[Trajectory]) -> None:
    """One optimizer step.

    Raises:
        RunError: a trajectory is staler than the run's bound.
    """
    algorithm, progress = session.config.algorithm, session.progress
    oldest = max(staleness_of(trajectories, progress.step))
    if oldest > algorithm.max_staleness:
        raise RunError(f"step {progress.step + 1}: staleness {oldest} is above the bound {algorithm.max_staleness}")
    batch, mini_batch = divmod(progress.step, algorithm.sync_every)
    session.console.phase("training")
    session.console.progress(mini_batch, algorithm.sync_every, "steps", f"batch {batch + 1}")
    parts = await measure_parts(session, trajectories, progress.step + 1)
    if session.journal is not None:
        await session.journal.add(progress.step, trajectories)
    started = time.monotonic()
    report = await take_step(session, trajectories)
    seconds = time.monotonic() - started
    progress.step += 1
    record_step(session, trajectories, report, gradient_noise(parts, report), seconds)


async def take_step(session: Session, trajectories: list[Trajectory]) -> StepResult:
    algorithm = session.config.algorithm
    return await session.policy.train_step(
        training_sequences(trajectories, algorithm.old_policy),
        algorithm.objective,
        step_routes(trajectories, session.config.routing),
    )


def record_step(
    session: Session, trajectories: list[Trajectory], report: StepResult, noise: dict[str, float], seconds: float
) -> None:
    """What the step that was just taken tells, as a row of metrics."""
    algorithm, step = session.config.algorithm, session.progress.step
    batch, mini_batch = divmod(step - 1, algorithm.sync_every)
    ages = staleness_of(trajectories, step - 1)
    assert report.packing is not None
    trained = sum(len(t.prompt.token_ids) + len(t.response_ids) - 1 for t in trajectories)
    sequences = {name: values.double().numpy() for name, values in report.sequences.items()}
    weights = weight_diagnostics(sequences, largest_coefficient(algorithm.objective.kernel))
    session.tally.add_step(trained)
    # Where all was sampled under exactly the trainer's weights, what differs is the engines; elsewhere also the weights.
    if max(ages) > 0:
        differences = difference_diagnostics(report.sums, "drift")
    elif algorithm.old_policy == "proximal":  # W is against the trainer itself, and has nothing of the engine
        differences = mismatch_figures(session.tally, session.console, *engine_mismatch(trajectories))
    else:
        differences = mismatch_figures(session.tally, session.console, report.sums, weights["log_weight/std"])
    session.record(
        "step",
        step,
        {
            "batch": batch,
            "mini_batch": mini_batch,
            "staleness": max(ages),
            "staleness/mean": float(np.mean(ages)),
            "loss": report.loss,
            "grad_norm": report.gradient_norm,
            "learning_rate": report.learning_rate,
            **weights,
            **differences,
            **token_diagnostics(report.sums),
            **routing_figures(trajectories, report, session.config.routing),
            **noise,
            **packing_figures(report.packing),
            "tokens/trained": trained,
            "time/train": seconds,
            "speed/trained_tokens_per_second": trained / seconds,
        },
    )
    if report.routing is not None:
        session.metrics.write_routing(step, by_layer(report.routing))
    # What is masked out of the loss has no weight that means anything.
    counted = sequences["tokens"] > 0
    vectors = {name: sequences[name][counted] for name in ("log_weight", "phi", "advantage")}
    prompts = list(dict.fromkeys(t.prompt.identity for t in trajectories))
    session.metrics.write_weights(step, max(ages), vectors | {"age": np.array(ages)[counted]}, prompts)
    session.tally.max_staleness_seen = max(session.tally.max_staleness_seen, *ages)


def staleness_of(trajectories: list[Trajectory], step: int) -> list[int]:
    """Optimizer steps between the weights of each one's oldest segment and those after `step` steps."""
    return [step - trajectory.oldest_weight_version for trajectory in trajectories]


async def evaluate_policy(session: Session, when: str) -> None:
    """With the trainer's weights of now. What the engine sampled before is not touched by that."""
    await sync_weights(session)
    await evaluate(session, when, session.progress.step)


async def sync_weights(session: Session, held_since: float | None = None) -> None:
    """Bring the trainer's weights to all engines, as weight version `step`, unless they have them; probe new engines.

    `held_since`: when (`time.monotonic`) requests began to be held for it, where any were running.
    """
    engines = session.engines
    if engines.waiting or engines.weight_version != session.progress.step:
        await send_weights(session, lambda: engines.present, held_since)
    if not session.engine_probed:
        await probe_engine_routes(session)
