"""The configuration of a whole run, one class per command."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from megatron_vespo.config.algorithm import AlgorithmConfig
from megatron_vespo.config.data import DataConfig, ExcludedPrompts, RewardConfig, Source
from megatron_vespo.config.model import ModelConfig, OptimizerConfig, PolicyConfig
from megatron_vespo.config.rollout import RolloutConfig, SamplingConfig, WeightSyncConfig
from megatron_vespo.config.section import Section


class EvaluationConfig(Section):
    sources: tuple[Source, ...] | None = None
    """None: the training sources, with `seed`."""
    prompts: PositiveInt = 128
    """Held-out prompts. No training prompt equals one of them."""
    samples_per_prompt: PositiveInt = 1
    """k of avg@k and pass@k."""
    sampling: SamplingConfig = SamplingConfig()
    every_batches: int = Field(default=0, ge=0)
    """Also evaluate after each so many rollout batches; 0: only before and after."""
    seed: int = 1_000_003
    """Of the held-out prompts; training prompts are drawn from the run's seed."""
    exclude: tuple[ExcludedPrompts, ...] = ()
    """Prompts that the model has seen before this run."""


class ObservabilityConfig(Section):
    console: Literal["auto", "live", "plain"] = "auto"
    """`live` redraws one view, `plain` prints a line per step; `auto` is live on a terminal."""
    tensorboard: bool = True
    sample_responses: PositiveInt = 8
    """Responses kept for the report from each evaluation."""


class TrainConfig(Section):
    """`megatron-vespo train`."""

    seed: int = Field(default=1, ge=0)
    """Of everything random: prompts, sampling, data order."""
    run_dir: str
    """Folder of this run's outputs."""
    overwrite: bool = False
    """Replace a run that is already in `run_dir`."""
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig
    policy: PolicyConfig = PolicyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    observability: ObservabilityConfig = ObservabilityConfig()

    @model_validator(mode="after")
    def step_feeds_every_rank(self):
        trajectories = self.algorithm.prompts_per_step * self.rollout.group_size
        ranks = self.policy.data_parallel_size
        if trajectories < ranks:
            raise ValueError(
                f"a step has {trajectories} trajectories (algorithm.prompts_per_step * rollout.group_size) "
                f"but there are {ranks} data-parallel ranks: each needs at least one"
            )
        return self

    @model_validator(mode="after")
    def warmup_ends(self):
        self.optimizer.check_warmup(self.algorithm.steps)
        return self

    @model_validator(mode="after")
    def groups_have_variance(self):
        if self.rollout.group_size < 2:
            raise ValueError("rollout.group_size is 1: a group's advantage needs at least two responses")
        return self


class DemonstrationsConfig(Section):
    path: str
    """A .jsonl file, each row {"prompt": text or chat messages, "response": text}."""
    batch_size: PositiveInt = 64
    """Demonstrations of one step."""
    max_tokens: PositiveInt = 4096
    """Longer demonstrations are an error that names the row."""


class SFTConfig(Section):
    """`megatron-vespo sft`."""

    seed: int = Field(default=1, ge=0)
    run_dir: str
    overwrite: bool = False
    model: ModelConfig
    demonstrations: DemonstrationsConfig
    steps: PositiveInt
    policy: PolicyConfig = PolicyConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    observability: ObservabilityConfig = ObservabilityConfig()

    @model_validator(mode="after")
    def warmup_ends(self):
        self.optimizer.check_warmup(self.steps)
        return self


class EvaluateConfig(Section):
    """`megatron-vespo eval`: what TASKS.yaml holds. The checkpoint is named on the command line."""

    data: DataConfig
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    """Its `sampling` is not used: evaluation has its own."""
    evaluation: EvaluationConfig = EvaluationConfig(samples_per_prompt=4)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the engine, unless `rollout.engine.dtype` says otherwise."""
