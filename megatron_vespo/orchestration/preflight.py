"""What can be known to be wrong before anything is started, and what a run needs from its files."""

from dataclasses import dataclass

import torch

from megatron_vespo.checkpoint.check import check_folder
from megatron_vespo.checkpoint.hf_config import Architecture, read_architecture
from megatron_vespo.checkpoint.shards import tensor_bytes
from megatron_vespo.checkpoint.tables import table_of
from megatron_vespo.config import ConfigError, ModelConfig, PolicyConfig, TrainConfig
from megatron_vespo.data.prompts import PromptStream, held_out_prompts, question_texts
from megatron_vespo.data.sources import numbered_sources
from megatron_vespo.data.tokenizer import ChatTokenizer, load_tokenizer
from megatron_vespo.rewards.scorers import build_scorers
from megatron_vespo.rollout.trajectory import Prompt


@dataclass(frozen=True)
class Prepared:
    """Checked inputs of a training run."""

    architecture: Architecture
    tokenizer: ChatTokenizer
    prompts: PromptStream
    held_out: list[Prompt]
    checkpoint_bytes: int


def prepare_training(config: TrainConfig) -> Prepared:
    """Raises ConfigError for whatever is wrong with the model's folder, the tokenizer, the tasks or the sizes."""
    architecture, checkpoint_bytes = check_model(config.model, config.policy)
    tokenizer = load_tokenizer(config.model.path)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > architecture.max_position_embeddings:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} is longer than the model's "
            f"{architecture.max_position_embeddings} positions ({config.model.path}/config.json: max_position_embeddings)"
        )
    build_scorers(numbered_sources(config.data, config.evaluation.sources))
    held_out = held_out_prompts(config.evaluation, config.data, tokenizer)
    prompts = PromptStream(config.data, tokenizer, seed=config.seed, excluded=question_texts(held_out))
    return Prepared(architecture, tokenizer, prompts, held_out, checkpoint_bytes)


def check_model(model: ModelConfig, policy: PolicyConfig) -> tuple[Architecture, int]:
    """The model's shape, and the bytes of the checkpoint that it will be exported to."""
    pretrained = model.initialization == "pretrained"
    architecture = check_folder(model.path) if pretrained else read_architecture(model.path)
    if architecture.num_experts % policy.layout.ep:
        raise ConfigError(
            f"policy.layout.ep ({policy.layout.ep}) does not divide the model's {architecture.num_experts} experts"
        )
    sizes = tensor_bytes(table_of(architecture).hf_shapes(architecture), getattr(torch, model.dtype))
    return architecture, sum(sizes.values())
