"""Typed settings. Importing this loads neither torch nor ray."""

from megatron_vespo.config.ablation import AblationConfig, PlannedRun, plan_runs
from megatron_vespo.config.algorithm import AdvantageConfig, AlgorithmConfig, OverlongShaping
from megatron_vespo.config.checkpoint import CheckpointConfig
from megatron_vespo.config.cluster import ClusterConfig
from megatron_vespo.config.data import (
    CustomSource,
    DataConfig,
    ExcludedPrompts,
    FileSource,
    ReasoningGymSource,
    RewardConfig,
    Source,
)
from megatron_vespo.config.load import load_config, load_tasks
from megatron_vespo.config.model import ModelConfig, OptimizerConfig
from megatron_vespo.config.objective import EngineCorrection, Kernel, KernelCoefficients, KLConfig, ObjectiveConfig
from megatron_vespo.config.policy import LayoutConfig, PolicyConfig, RecomputeConfig, ReferenceConfig
from megatron_vespo.config.rollout import (
    DiskSyncConfig,
    EngineConfig,
    ResponseLengthConfig,
    RolloutConfig,
    RouterNoiseConfig,
    SamplingConfig,
    WeightSyncConfig,
)
from megatron_vespo.config.routing import RoutingConfig
from megatron_vespo.config.run import (
    DemonstrationsConfig,
    EvaluateConfig,
    EvaluationConfig,
    ObservabilityConfig,
    SFTConfig,
    SinksConfig,
    TrainConfig,
    WandbConfig,
)
from megatron_vespo.config.section import Section
from megatron_vespo.errors import ConfigError

__all__ = [
    "AblationConfig",
    "AdvantageConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "ConfigError",
    "CustomSource",
    "DataConfig",
    "DemonstrationsConfig",
    "DiskSyncConfig",
    "EngineConfig",
    "EngineCorrection",
    "EvaluateConfig",
    "EvaluationConfig",
    "ExcludedPrompts",
    "FileSource",
    "KLConfig",
    "Kernel",
    "KernelCoefficients",
    "LayoutConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ObservabilityConfig",
    "OptimizerConfig",
    "OverlongShaping",
    "PlannedRun",
    "PolicyConfig",
    "ReasoningGymSource",
    "RecomputeConfig",
    "ReferenceConfig",
    "ResponseLengthConfig",
    "RewardConfig",
    "RolloutConfig",
    "RouterNoiseConfig",
    "RoutingConfig",
    "SFTConfig",
    "SamplingConfig",
    "Section",
    "SinksConfig",
    "Source",
    "TrainConfig",
    "WandbConfig",
    "WeightSyncConfig",
    "load_config",
    "load_tasks",
    "plan_runs",
]
