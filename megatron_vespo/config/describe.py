"""What a configuration comes to, in numbers that a person checks before a run."""

import yaml

from megatron_vespo.config.run import TrainConfig
from megatron_vespo.config.section import Section


def dump(config: Section) -> str:
    """All settings with their defaults filled in, as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).rstrip()


def derived_numbers(config: TrainConfig) -> list[str]:
    """One sentence each."""
    algorithm, group = config.algorithm, config.rollout.group_size
    prompts = algorithm.rollout_batch_prompts
    per_step = algorithm.prompts_per_step * group
    batches = algorithm.steps // algorithm.staleness
    layout = config.policy.layout
    return [
        f"rollout batch: {prompts} prompts x {group} = {prompts * group} trajectories "
        f"= {algorithm.staleness} steps of {per_step}",
        f"run: {batches} rollout batches = {algorithm.steps} steps, {algorithm.steps * per_step:,} trajectories",
        f"staleness: at most {algorithm.staleness - 1} optimizer steps between sampling and training",
        f"layout: {config.policy.ranks} ranks = data parallel {config.policy.data_parallel_size}, expert parallel {layout.ep}",
        f"longest sequence: {config.data.max_prompt_tokens} + {config.rollout.max_response_tokens} tokens; "
        f"micro-batches of up to {config.policy.micro_batch_tokens} tokens",
    ]


def describe_run(config: TrainConfig, full: bool) -> str:
    numbers = "\n".join(f"  {line}" for line in derived_numbers(config))
    return f"{dump(config)}\n\n{numbers}" if full else numbers
