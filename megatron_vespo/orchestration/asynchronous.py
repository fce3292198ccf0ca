"""The asynchronous loop: the engine samples without pause, the trainer takes groups as they are complete."""

import time

from megatron_vespo.orchestration.busy_time import BusyTime, seconds_of_both
from megatron_vespo.orchestration.checkpoints import Checkpoints
from megatron_vespo.orchestration.engine_weights import attended
from megatron_vespo.orchestration.evaluation import evaluate
from megatron_vespo.orchestration.exports import Exports
from megatron_vespo.orchestration.generator import Generator
from megatron_vespo.orchestration.mismatch_probe import measure_mismatch
from megatron_vespo.orchestration.rollouts import prepare_groups
from megatron_vespo.orchestration.session import Session
from megatron_vespo.orchestration.steps import evaluate_policy, sync_weights, train_step


async def train(session: Session) -> None:
    algorithm, progress = session.config.algorithm, session.progress
    assert algorithm.asynchronous is not None
    exports = Exports(session)
    training, started = BusyTime(), time.monotonic()
    if progress.step == 0:
        await evaluate_policy(session, "before")
    await exports.after_step()
    await sync_weights(session)
    generator = Generator(session)
    checkpoints = Checkpoints(session, generator.note_progress)
    generator.start()
    try:
        while progress.step < algorithm.steps:
            waiting = time.monotonic()
            groups = await attended(session, generator.next_step(), generator.start)
            training.set(True, time.monotonic())
            trajectories = await prepare_groups(session, generator, groups, time.monotonic() - waiting)
            await train_step(session, trajectories)
            session.tally.trajectories_used += len(trajectories)
            training.set(False, time.monotonic())
            if progress.step % algorithm.sync_every == 0 and progress.step < algorithm.steps:
                async with generator.held() as held_since:
                    await sync_weights(session, held_since)
                if session.weights.syncs % algorithm.asynchronous.mismatch_every == 0:
                    await measure_mismatch(session)
            if session.evaluation_due():
                await evaluate_held_out(session, generator)
            await checkpoints.after_step()
            await exports.after_step()
    finally:
        await generator.stop()
    now = time.monotonic()
    session.tally.overlap = seconds_of_both(generator.busy.until(now), training.until(now)) / (now - started)
    session.tally.trajectories_left = sum(len(group.trajectories) for group in generator.complete.values())

    await evaluate_policy(session, "after")
    await checkpoints.settle(wait=True)
    await exports.settle(wait=True)
    await session.export_checkpoint()


async def evaluate_held_out(session: Session, generator: Generator) -> None:
    """With the trainer's weights of now, beside what is being sampled."""
    # An engine that waits for them while others have them is seen to in `evaluate`, and nothing is interrupted for it.
    if session.engines.weight_version != session.progress.step:
        async with generator.held() as held_since:
            await sync_weights(session, held_since)
    # Not `evaluate_policy`: engines sample again, and one that comes back now gets its weights beside the others' work.
    await evaluate(session, "during", session.progress.step)
