"""What can be known to be wrong before anything is started, and what a run needs from its files."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vespo.architecture.hf_config import Architecture, read_architecture
from megatron_vespo.architecture.layout_fit import require_fit
from megatron_vespo.checkpoint.check import check_folder
from megatron_vespo.checkpoint.shards import tensor_bytes
from megatron_vespo.checkpoint.tables import table_of
from megatron_vespo.config import (
    AlgorithmConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.data.prompts import PromptStream, held_out_prompts, question_texts
from megatron_vespo.data.sources import numbered_sources
from megatron_vespo.data.tokenizer import ChatTokenizer, load_tokenizer
from megatron_vespo.objective.advantages import advantage_function
from megatron_vespo.objective.kernels import custom_function
from megatron_vespo.observability.open_metrics import check_sinks
from megatron_vespo.orchestration.engine import engine_settings
from megatron_vespo.rewards.scorers import build_environments, build_scorers
from megatron_vespo.rollout.server import EngineServer


@dataclass(frozen=True)
class Prepared:
    """Checked inputs of a training run."""

    architecture: Architecture
    tokenizer: ChatTokenizer
    prompts: PromptStream
    held_out: list[Prompt]
    checkpoint_bytes: int


def prepare_training(config: TrainConfig) -> Prepared:
    """Raises ConfigError for whatever is wrong with the model's folder, the tokenizer, the tasks, the sizes or the sinks."""
    check_sinks(config.observability)
    architecture, checkpoint_bytes = check_model(config.model, config.policy)
    check_functions(config.algorithm)
    check_routing(config, architecture)
    tokenizer = load_tokenizer(config.model.path)
    check_engine(
        *(config.model.path, config.model.dtype, architecture, config.data, config.rollout),
        return_routed_experts=config.routing.engine_records,
    )
    sources = numbered_sources(config.data, config.evaluation.sources)
    build_scorers(sources)
    build_environments(sources)
    held_out = held_out_prompts(config.evaluation, config.data, tokenizer)
    prompts = PromptStream(config.data, tokenizer, seed=config.seed, excluded=question_texts(held_out))
    prompts.require_usable()
    return Prepared(architecture, tokenizer, prompts, held_out, checkpoint_bytes)


def check_routing(config: TrainConfig, architecture: Architecture) -> None:
    """Raises ConfigError where routes or routers are asked for and there are none."""
    routing = config.routing
    if not architecture.is_moe and (routing.replay != "off" or routing.record):
        raise ConfigError(
            f"routing: replay {routing.replay} and record {str(routing.record).lower()}, but {config.model.path} has no "
            "experts: leave this section out"
        )
    if not architecture.is_moe and config.rollout.engine.router_noise is not None:
        raise ConfigError(f"rollout.engine.router_noise: {config.model.path} has no router: leave it out")


def check_engine(
    model_path: str,
    model_dtype: str,
    architecture: Architecture,
    data: DataConfig,
    rollout: RolloutConfig,
    *,
    return_routed_experts: bool = False,
) -> None:
    """Raises ConfigError where SGLang would not serve this model with these settings."""
    if architecture.is_moe:
        check_experts_of_engine(model_path, architecture)
    settings = engine_settings(
        *(model_path, model_dtype, data, rollout), seed=0, logs=Path(), return_routed_experts=return_routed_experts
    )
    EngineServer(**settings)


def check_experts_of_engine(model_path: str, architecture: Architecture) -> None:
    """Raises ConfigError for what SGLang 0.5.23's Qwen3MoeForCausalLM ignores in a config.json, without a word."""
    if architecture.tied_embeddings:
        raise ConfigError(
            f"{model_path}/config.json: tie_word_embeddings is true, and SGLang's {architecture.architecture} has an "
            "output layer of its own: save the model with tie_word_embeddings false and lm_head.weight written out"
        )
    if not all(architecture.moe_layers):
        raise ConfigError(
            f"{model_path}/config.json: mlp_only_layers or decoder_sparse_step make some layers dense, and SGLang's "
            f"{architecture.architecture} has experts in every layer: it can't sample from this model (sft can train it)"
        )


def check_functions(algorithm: AlgorithmConfig) -> None:
    """Raises ConfigError where a dotted path of the algorithm names no function."""
    if algorithm.objective.kernel.name == "custom":
        custom_function(algorithm.objective.kernel)
    if algorithm.advantage.estimator == "custom":
        advantage_function(algorithm.advantage)


def check_model(model: ModelConfig, policy: PolicyConfig) -> tuple[Architecture, int]:
    """The model's shape, and the bytes of the checkpoint that it will be exported to."""
    pretrained = model.initialization == "pretrained"
    architecture = check_folder(model.path) if pretrained else read_architecture(model.path)
    require_fit(architecture, policy)
    if policy.reference is not None and policy.reference.path is not None:
        require_same_shape(check_folder(policy.reference.path), architecture, policy.reference.path)
    sizes = tensor_bytes(table_of(architecture).hf_shapes(architecture), getattr(torch, model.dtype))
    return architecture, sum(sizes.values())


def require_same_shape(reference: Architecture, architecture: Architecture, path: str) -> None:
    """The reference is computed in the policy's own model."""
    theirs, ours = vars(reference), vars(architecture)
    different = [
        f"{name} {theirs[name]} (policy: {ours[name]})"
        for name in ours
        if theirs[name] != ours[name] and name != "max_position_embeddings"
    ]
    if different:
        raise ConfigError(
            f"policy.reference.path: {path} is another model than model.path: {'; '.join(different)}. The reference "
            "must have the policy's architecture"
        )
