"""The synchronous loop: sample a batch, train N steps on it, bring the weights to the engine; again."""

import time

from megatron_vespo.config import TrainConfig
from megatron_vespo.objective.diagnostics import (
    difference_diagnostics,
    mismatch_alarm,
    token_diagnostics,
    weight_diagnostics,
)
from megatron_vespo.objective.kernels import largest_coefficient
from megatron_vespo.observability.console import RunConsole
from megatron_vespo.orchestration.checkpoints import Checkpoints
from megatron_vespo.orchestration.evaluation import evaluate
from megatron_vespo.orchestration.exports import Exports
from megatron_vespo.orchestration.gradient_noise import gradient_noise, measure_parts
from megatron_vespo.orchestration.mini_batches import mini_batches, packing_figures, training_sequences
from megatron_vespo.orchestration.rescoring import engine_mismatch
from megatron_vespo.orchestration.rollouts import collect_rollouts
from megatron_vespo.orchestration.routing_probe import probe_engine_routes
from megatron_vespo.orchestration.session import Session
from megatron_vespo.orchestration.step_routes import by_layer, routing_figures, step_routes
from megatron_vespo.orchestration.training_run import Resume, run_training_loop
from megatron_vespo.policy.result import StepResult
from megatron_vespo.rollout.trajectory import Trajectory


def run_training(config: TrainConfig, console: RunConsole, resume: Resume) -> str:
    """`megatron-vespo train`: everything from the checks to the report. Returns what to tell the user at the end."""
    return run_training_loop(config, console, train, resume)


async def train(session: Session) -> None:
    algorithm, progress = session.config.algorithm, session.progress
    checkpoints, exports = Checkpoints(session), Exports(session)
    if progress.step == 0:
        await evaluate_policy(session, "before")
    await exports.after_step()

    while progress.step < algorithm.steps:
        if not progress.mini_batches:
            await sync_weights(session)
            groups = await collect_rollouts(session, progress.step // algorithm.staleness, progress.step)
            progress.mini_batches = list(mini_batches(groups, algorithm.prompts_per_step))
            await checkpoints.settle(wait=False)
        await train_step(session, progress.mini_batches.pop(0))
        if session.evaluation_due():
            await evaluate_policy(session, "during")
        await checkpoints.after_step()
        await exports.after_step()

    await evaluate_policy(session, "after")
    await checkpoints.settle(wait=True)
    await exports.settle(wait=True)
    await session.export_checkpoint()


async def train_step(session: Session, trajectories: list[Trajectory]) -> None:
    """One optimizer step. Before it the trainer is `mini_batch` steps ahead of the weights that sampled."""
    algorithm, progress = session.config.algorithm, session.progress
    batch, mini_batch = divmod(progress.step, algorithm.staleness)
    session.console.phase("training")
    session.console.progress(mini_batch, algorithm.staleness, "steps", f"batch {batch + 1}")
    parts = await measure_parts(session, trajectories, progress.step + 1)
    started = time.monotonic()
    report = await session.policy.train_step(
        training_sequences(trajectories, algorithm.old_policy),
        algorithm.objective,
        step_routes(trajectories, session.config.routing),
    )
    seconds = time.monotonic() - started
    progress.step += 1
    record_step(session, trajectories, report, gradient_noise(parts, report), seconds)


def record_step(
    session: Session, trajectories: list[Trajectory], report: StepResult, noise: dict[str, float], seconds: float
) -> None:
    """What the step that was just taken tells, as a row of metrics."""
    algorithm, step = session.config.algorithm, session.progress.step
    batch, mini_batch = divmod(step - 1, algorithm.staleness)
    assert report.packing is not None
    trained = sum(len(t.prompt.token_ids) + len(t.response_ids) - 1 for t in trajectories)
    sequences = {name: values.double().numpy() for name, values in report.sequences.items()}
    weights = weight_diagnostics(sequences, largest_coefficient(algorithm.objective.kernel))
    # The engine holds exactly the trainer's weights only at the first mini-batch: what differs there is the engines.
    if mini_batch > 0:
        session.tally.add_step(trained, None)
        differences = difference_diagnostics(report.sums, "drift")
    else:
        sums, spread = report.sums, weights["log_weight/std"]
        if algorithm.old_policy == "proximal":  # W is against the trainer itself, and has nothing of the engine
            sums, spread = engine_mismatch(trajectories)
        session.tally.add_step(trained, sums)
        differences = {**difference_diagnostics(sums, "mismatch"), "alarm/mismatch": mismatch_alarm(spread)}
        if differences["alarm/mismatch"]:
            session.console.event(
                f"ALARM: engine and trainer disagree: std(log W) is {spread:.2f} at equal weights (docs/metrics.md)"
            )
    session.record(
        "step",
        step,
        {
            "batch": batch,
            "mini_batch": mini_batch,
            "staleness": mini_batch,
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
    session.metrics.write_weights(
        step, mini_batch, {name: sequences[name][counted] for name in ("log_weight", "phi", "advantage")}
    )


async def evaluate_policy(session: Session, when: str) -> None:
    """With the trainer's weights of now. What the engine sampled before is not touched by that."""
    await sync_weights(session)
    await evaluate(session, when, session.progress.step)


async def sync_weights(session: Session) -> None:
    """Bring the trainer's weights to the engine, as weight version `step`, unless it has them; probe a new engine."""
    if session.weights.weight_version != session.progress.step:
        await send_weights(session)
    if not session.engine_probed:
        await probe_engine_routes(session)


async def send_weights(session: Session) -> None:
    session.console.phase("syncing weights")
    step = session.progress.step
    report = await session.weights.sync(weight_version=step)
    session.record(
        "sync",
        step,
        {
            "weight_version": report.weight_version,
            "bytes": report.bytes,
            "buckets": report.buckets,
            "verified": report.verified,
            "mismatches": session.weights.mismatches,
            "time/sync": sum(report.seconds.values()),
            **{f"time/{name}": seconds for name, seconds in report.seconds.items()},
        },
    )
