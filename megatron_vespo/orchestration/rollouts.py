"""One rollout batch: prompts are sampled on the engine, graded, and given advantages."""

from megatron_vespo.orchestration.mini_batches import assign_advantages, settle_truncated, shape_rewards
from megatron_vespo.orchestration.rescoring import rescore
from megatron_vespo.orchestration.routing_probe import probe_batch
from megatron_vespo.orchestration.session import Session
from megatron_vespo.orchestration.step_routes import recording_figures
from megatron_vespo.rollout.generate import generate_groups
from megatron_vespo.rollout.trajectory import Group


async def collect_rollouts(session: Session, batch: int, weight_version: int) -> list[Group]:
    """Groups of rollout batch `batch`, sampled under `weight_version`, in the order of their prompts."""
    config, sampler = session.config, session.sampler
    prompts = session.prompts.take(config.algorithm.rollout_batch_prompts)
    session.console.phase("generating")
    stream = generate_groups(
        sampler.client,
        prompts,
        config.rollout,
        stop_token_ids=sampler.tokenizer.stop_token_ids,
        vocab_size=sampler.vocab_size,
        run_seed=config.seed,
        batch_index=batch,
        weight_version=weight_version,
        cache_version=session.weights.cache_version,
        routes=session.routing_shape,
    )
    groups, seconds, grading_seconds = await sampler.collect(stream, prompts)
    settle_truncated(groups, config.rollout)
    figures = sampler.describe(groups) | await probe_batch(session, groups)
    await rescore(session, groups)
    figures |= recording_figures([t for group in groups for t in group.trajectories])
    shape_rewards(groups, config.algorithm, config.rollout.max_response_tokens)
    assign_advantages(groups, config.algorithm.advantage)

    left_out = sum(not group.trained for group in groups)
    session.tally.generated_tokens += int(figures["response/tokens"])
    session.record(
        "rollout",
        weight_version,
        {
            "batch": batch,
            "weight_version": weight_version,
            **figures,
            "advantage/groups_left_out": left_out,
            "prompt/dropped_overlong": session.prompts.dropped_overlong,
            "prompt/skipped_held_out": session.prompts.skipped_excluded,
            "time/generate": seconds,
            "time/reward_wait": grading_seconds,
            "speed/generated_tokens_per_second": figures["response/tokens"] / seconds,
        },
    )
    return groups
