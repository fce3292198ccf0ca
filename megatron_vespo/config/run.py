"""The configuration of a whole run, one class per command."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_vespo.config.algorithm import AlgorithmConfig
from megatron_vespo.config.checkpoint import CheckpointConfig
from megatron_vespo.config.cluster import ClusterConfig
from megatron_vespo.config.data import DataConfig, ExcludedPrompts, RewardConfig, Source
from megatron_vespo.config.model import ModelConfig, OptimizerConfig
from megatron_vespo.config.policy import PolicyConfig
from megatron_vespo.config.rollout import RolloutConfig, SamplingConfig, WeightSyncConfig
from megatron_vespo.config.routing import RoutingConfig
from megatron_vespo.config.section import Section


class EvaluationConfig(Section):
    sources: tuple[Source, ...] | None = None
    """None: the training sources, with `seed`."""
    prompts: PositiveInt = 128
    """Held-out prompts. No training prompt equals one of them."""
    samples_per_prompt: PositiveInt = 1
    """k of avg@k and pass@k."""
    sampling: SamplingConfig = SamplingConfig()
    every_steps: int = Field(default=0, ge=0)
    """Also evaluate after each so many optimizer steps, within a rollout batch too; 0: only before and after."""
    seed: int = 1_000_003
    """Of the held-out prompts; training prompts are drawn from the run's seed."""
    exclude: tuple[ExcludedPrompts, ...] = ()
    """Prompts that the model has seen before this run."""

    def seed_problems(self, key: str, rollout: RolloutConfig) -> Iterator[tuple[str, str]]:
        """What cannot be sampled with a seed for each sample."""
        if rollout.deterministic and self.sampling.min_p > 0:
            yield f"{key}.sampling.min_p", "SGLang has no min_p with seeds (rollout.deterministic): set it to 0"


class WandbConfig(Section):
    """A run of Weights & Biases. Who logs in, and where, is its own affair: `wandb login`, or WANDB_API_KEY."""

    project: str = Field(min_length=1)
    """Made by W&B where there is none of this name."""
    entity: str | None = None
    """Team or user that has the project; none: the default of who is logged in."""
    name: str | None = None
    """Of the run; none: the name of `run_dir`."""
    group: str | None = None
    """Runs of one group are shown together."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""
    mode: Literal["online", "offline"] = "online"
    """`offline`: nothing leaves the host; `wandb sync RUN/wandb` uploads it later."""


class SinksConfig(Section):
    console: Literal["auto", "live", "plain"] = "auto"
    """`live` redraws one view, `plain` prints a line per step; `auto` is live on a terminal."""
    tensorboard: bool = True
    """Write its files too, into `run_dir`/tensorboard."""
    wandb: WandbConfig | None = None
    """Send the same numbers to Weights & Biases; its own files are in `run_dir`/wandb. Needs `pip install wandb`."""


class ObservabilityConfig(SinksConfig):
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
    routing: RoutingConfig = RoutingConfig()
    policy: PolicyConfig = PolicyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    cluster: ClusterConfig = ClusterConfig()

    def own_problems(self) -> Iterator[tuple[str, str]]:
        trajectories = self.algorithm.prompts_per_step * self.rollout.group_size
        ranks = self.policy.data_parallel_size
        if trajectories < ranks:
            yield (
                "algorithm.prompts_per_step",
                f"a step has {trajectories} trajectories (prompts_per_step * rollout.group_size) but there are "
                f"{ranks} data-parallel ranks: each needs at least one",
            )
        asynchronous = self.algorithm.asynchronous
        if asynchronous is not None and asynchronous.update == "in_place" and self.weight_sync.flush_cache:
            yield (
                "weight_sync.flush_cache",
                "asynchronous.update: in_place keeps the cache of what is being sampled: set it to false",
            )
        if self.rollout.response_length is not None and any(source.environment for source in self.data.sources):
            yield "rollout.response_length", "a response of several turns has no drawn length: leave out one of the two"
        if self.checkpoint.save_every > 0 and self.policy.optimizer_cpu_offload > 0:
            yield "checkpoint.save_every", "not together with policy.optimizer_cpu_offload: set one of them to 0"
        if self.policy.reference is not None and self.model.initialization == "random":
            yield "policy.reference", "a model that starts from random weights has no reference: leave it out"
        if self.algorithm.objective.kl.coefficient > 0 and self.policy.reference is None:
            yield "algorithm.objective.kl.coefficient", "needs a frozen model: set policy.reference (`{}` is the start)"
        yield from self.algorithm.overlong_problems(self.rollout.max_response_tokens)
        yield from self.optimizer.warmup_problems(self.algorithm.steps)
        yield from self.evaluation.seed_problems("evaluation", self.rollout)


class DemonstrationsConfig(Section):
    path: str
    """A .jsonl file, each row {"prompt": text or chat messages, "response": text}."""
    batch_size: PositiveInt = 64
    """Demonstrations of one step."""
    max_tokens: PositiveInt = 4096
    """Longer demonstrations are an error that names the row."""


class SFTOptimizerConfig(OptimizerConfig):
    learning_rate: PositiveFloat = 1e-5


class SFTConfig(Section):
    """`megatron-vespo sft`."""

    seed: int = Field(default=1, ge=0)
    """Of everything random."""
    run_dir: str
    """Folder of this run's outputs."""
    overwrite: bool = False
    """Replace a run that is already in `run_dir`."""
    model: ModelConfig
    demonstrations: DemonstrationsConfig
    steps: PositiveInt
    """Optimizer steps."""
    policy: PolicyConfig = PolicyConfig()
    optimizer: SFTOptimizerConfig = SFTOptimizerConfig()
    observability: SinksConfig = SinksConfig()
    cluster: ClusterConfig = ClusterConfig()

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if self.policy.reference is not None:
            yield "policy.reference", "supervised training has no KL term: leave it out"
        if self.optimizer.scale_by_kept_gradient:
            yield "optimizer.scale_by_kept_gradient", "supervised training has no kernel: leave it out"
        yield from self.optimizer.warmup_problems(self.steps)


class CheckpointEvaluationConfig(EvaluationConfig):
    samples_per_prompt: PositiveInt = 4


class EvaluateConfig(Section):
    """`megatron-vespo eval`: what TASKS.yaml holds. The checkpoint is named on the command line."""

    data: DataConfig
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    """Its `sampling` is not used: evaluation has its own."""
    evaluation: CheckpointEvaluationConfig = CheckpointEvaluationConfig()
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the engine, unless `rollout.engine.dtype` says otherwise."""
    cluster: ClusterConfig = ClusterConfig()

    @classmethod
    def of_training(cls, run: TrainConfig) -> "EvaluateConfig":
        """The held-out prompts of a training run, sampled as there, on this host."""
        return cls(
            data=run.data,
            reward=run.reward,
            rollout=run.rollout,
            evaluation=CheckpointEvaluationConfig(**run.evaluation.model_dump()),
            dtype=run.model.dtype,
            cluster=ClusterConfig(interface=run.cluster.interface),
        )

    def own_problems(self) -> Iterator[tuple[str, str]]:
        yield from self.evaluation.seed_problems("evaluation", self.rollout)
