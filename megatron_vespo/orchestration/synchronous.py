"""The synchronous loop: sample a batch, train N steps on it, bring the weights to the engine; again."""

from megatron_vespo.orchestration.checkpoints import Checkpoints
from megatron_vespo.orchestration.exports import Exports
from megatron_vespo.orchestration.mini_batches import mini_batches
from megatron_vespo.orchestration.rollouts import collect_rollouts
from megatron_vespo.orchestration.session import Session
from megatron_vespo.orchestration.steps import evaluate_policy, sync_weights, train_step


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
