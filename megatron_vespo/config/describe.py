"""What a configuration comes to, in numbers that a person checks before a run."""

import yaml

from megatron_vespo.config.policy import PolicyConfig
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
    if algorithm.asynchronous is None:
        shape = [
            f"rollout batch: {prompts} prompts x {group} = {prompts * group} trajectories "
            f"= {algorithm.staleness} steps of {per_step}",
            f"run: {batches} rollout batches = {algorithm.steps} steps, {algorithm.steps * per_step:,} trajectories",
        ]
    else:
        shape = [
            f"step: {algorithm.prompts_per_step} prompts x {group} = {per_step} trajectories, of whatever is complete",
            f"run: {algorithm.steps} steps, {algorithm.steps * per_step:,} trajectories, new weights every "
            f"{algorithm.sync_every} steps",
        ]
    return [
        *shape,
        f"staleness: at most {algorithm.max_staleness} optimizer steps between sampling and training",
        describe_layout(config.policy),
        f"longest sequence: {config.data.max_prompt_tokens} + {config.rollout.max_response_tokens} tokens; "
        f"micro-batches of up to {config.policy.micro_batch_tokens * config.policy.layout.cp} tokens",
    ]


def describe_layout(policy: PolicyConfig) -> str:
    layout = policy.layout
    axes = {"tensor": layout.tp, "context": layout.cp, "data": policy.data_parallel_size, "pipeline": layout.pp}
    expert_data = policy.ranks // layout.expert_model_ranks
    expert_axes = {"tensor": layout.etp, "expert": layout.ep, "data": expert_data, "pipeline": layout.pp}
    text = f"layout: {policy.ranks} ranks = {_product(axes)}; experts: {_product(expert_axes)}"
    return text + (f"; {layout.vpp} interleaved chunks of layers per stage" if layout.vpp > 1 else "")


def _product(axes: dict[str, int]) -> str:
    """The axes that are split; one rank alone is data parallel 1."""
    split = {name: size for name, size in axes.items() if size > 1} or {"data": 1}
    return " x ".join(f"{name} parallel {size}" for name, size in split.items())


def describe_run(config: TrainConfig, full: bool) -> str:
    numbers = "\n".join(f"  {line}" for line in derived_numbers(config))
    return f"{dump(config)}\n\n{numbers}" if full else numbers
