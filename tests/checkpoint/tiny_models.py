"""Random tiny folders of every architecture, written by transformers."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 131
"""Odd, and more than the tokenizer has."""


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
KINDS = {
    "moe": lambda **sizes: Qwen3MoeConfig(**sizes, **EXPERTS),
    "mixed": lambda **sizes: Qwen3MoeConfig(**sizes, **EXPERTS, mlp_only_layers=[0]),
    "qwen3": Qwen3Config,
    "llama": lambda **sizes: LlamaConfig(
        **sizes | {"hidden_size": 96, "max_position_embeddings": 16384}, rope_parameters=dict(LLAMA_3_ROPE)
    ),
}


def tiny_config(kind: str = "moe", *, tied: bool = False, layers: int = 3) -> PreTrainedConfig:
    return KINDS[kind](**COMMON, num_hidden_layers=layers, tie_word_embeddings=tied)


def write_tiny_model(
    folder: Path,
    *,
    kind: str = "moe",
    tied: bool = False,
    layers: int = 3,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    seed: int = 0,
    spread: float = 0.2,
) -> PreTrainedModel:
    """Save a model whose every weight is random (norms too, which transformers starts at 1), with a tokenizer.

    `spread`: standard deviation of the weights.
    """
    model = AutoModelForCausalLM.from_config(tiny_config(kind, tied=tied, layers=layers))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            center = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(center + spread * torch.randn(parameter.shape, generator=generator))
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefghij"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return model
