"""From prompts to what is trained on: sampled on the engine, graded, scored by the trainer, given advantages."""

import math

from megatron_vespo.orchestration.engine_weights import attended
from megatron_vespo.orchestration.generator import Generator
from megatron_vespo.orchestration.mini_batches import (
    assign_advantages,
    first_with_variance,
    mark_trained,
    settle_truncated,
    shape_rewards,
)
from megatron_vespo.orchestration.rescoring import rescore
from megatron_vespo.orchestration.routing_probe import probe_batch
from megatron_vespo.orchestration.session import Session
from megatron_vespo.orchestration.step_routes import recording_figures
from megatron_vespo.rollout.generate import generate_groups
from megatron_vespo.rollout.trajectory import Group, Trajectory


async def collect_rollouts(session: Session, batch: int, weight_version: int) -> list[Group]:
    """Groups of rollout batch `batch`, sampled under `weight_version`, in the order of their prompts."""
    config, sampler = session.config, session.sampler
    needed = config.algorithm.rollout_batch_prompts
    prompts = session.prompts.take(math.ceil(needed * config.algorithm.over_sampling))
    session.console.phase("generating")
    stream = generate_groups(
        sampler.fleet,
        prompts,
        config.rollout,
        stop_token_ids=sampler.tokenizer.stop_token_ids,
        vocab_size=sampler.vocab_size,
        run_seed=config.seed,
        batch_index=batch,
        weight_version=weight_version,
        cache_version=session.weights.cache_version,
        routes=session.routing_shape,
        environment=sampler.answer,
    )
    sampled, seconds, grading_seconds = await attended(session, sampler.collect(stream, prompts))
    settle_truncated(sampled, config.rollout)
    groups = first_with_variance(sampled, needed)
    figures = sampler.describe(groups) | await probe_batch(session, groups)
    await rescore(session, groups)
    figures |= recording_figures([t for group in groups for t in group.trajectories])
    mark_trained(groups, config.algorithm.advantage)
    shape_rewards(groups, config.algorithm, config.rollout.max_response_tokens)
    assign_advantages(groups, config.algorithm.advantage)

    left_out = sum(not group.trained for group in groups)
    tokens = sum(trajectory.sampled_tokens for group in sampled for trajectory in group.trajectories)
    session.tally.generated_tokens += tokens
    session.record(
        "rollout",
        weight_version,
        {
            "batch": batch,
            "weight_version": weight_version,
            **figures,
            "advantage/groups_left_out": left_out,
            "advantage/groups_over_sampled": len(sampled) - len(groups),
            "prompt/dropped_overlong": session.prompts.dropped_overlong,
            "prompt/skipped_held_out": session.prompts.skipped_excluded,
            "time/generate": seconds,
            "time/reward_wait": grading_seconds,
            "speed/generated_tokens_per_second": tokens / seconds,
        },
    )
    return groups


async def prepare_groups(
    session: Session, generator: Generator, groups: list[Group], waited_seconds: float
) -> list[Trajectory]:
    """The groups of one asynchronous step, scored by the trainer and given advantages, and a row about them."""
    config, step = session.config, session.progress.step
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    figures = session.sampler.describe(groups)
    await rescore(session, groups)
    figures |= recording_figures(trajectories)
    shape_rewards(groups, config.algorithm, config.rollout.max_response_tokens)
    assign_advantages(groups, config.algorithm.advantage)
    session.record(
        "rollout",
        step,
        {
            "batch": step // config.algorithm.sync_every,
            "weight_version": session.engines.weight_version,
            **figures,
            "response/segments_mean": sum(len(t.segments) for t in trajectories) / len(trajectories),
            "buffer/complete": len(generator.complete),
            "buffer/running": generator.running,
            "time/wait": waited_seconds,
            "speed/generated_tokens_per_second": generator.take_speed(),
        },
    )
    return trajectories
