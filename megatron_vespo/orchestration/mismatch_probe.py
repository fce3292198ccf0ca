"""How far engine and trainer are apart at equal weights, in a run that never trains on what has its own weights."""

from megatron_vespo.orchestration.mini_batches import response_log_probs, training_sequences
from megatron_vespo.orchestration.mismatch import mismatch_figures
from megatron_vespo.orchestration.rescoring import engine_mismatch
from megatron_vespo.orchestration.routing_probe import probe_batch, sample_probe
from megatron_vespo.orchestration.session import Session
from megatron_vespo.orchestration.step_routes import step_routes

PROMPTS = 8


async def measure_mismatch(session: Session) -> None:
    """Sample a few responses under the weights that the trainer has now too, score them, and record a row.

    Call it right after a weight update, before the next step.
    """
    config, step = session.config, session.progress.step
    groups = await sample_probe(
        session, "mismatch probe", PROMPTS, config.rollout.group_size, config.rollout.max_response_tokens
    )
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    sequences = training_sequences(trajectories, "behavior")
    routes = step_routes(trajectories, config.routing, measure=False) if config.routing.replay == "R3" else None
    scores = await session.policy.score(sequences, routes=routes)
    for trajectory, score in zip(trajectories, scores, strict=True):
        trajectory.proximal_log_probs = response_log_probs(trajectory, score)
    figures = mismatch_figures(session.tally, session.console, *engine_mismatch(trajectories))
    session.record("mismatch", step, figures | await probe_batch(session, groups))
