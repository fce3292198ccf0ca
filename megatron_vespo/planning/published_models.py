"""Shapes of well-known models, as their config.json on the Hugging Face hub has them, so that a plan needs no download.

Source: huggingface.co/Qwen, config.json of each model (2025-04-29). Only what decides sizes is here.
"""

from pathlib import Path
from typing import Any

from megatron_vespo.architecture.hf_config import Architecture, parse_architecture, read_architecture
from megatron_vespo.config import ConfigError

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": False,
    "vocab_size": 151_936,
}
_QWEN3_MOE = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def _sizes(hidden: int, layers: int, heads: int, groups: int, inner: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": inner,
        **others,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _QWEN3 | _sizes(1024, 28, 16, 8, 3072, tie_word_embeddings=True),
    "Qwen/Qwen3-1.7B": _QWEN3 | _sizes(2048, 28, 16, 8, 6144, tie_word_embeddings=True),
    "Qwen/Qwen3-4B": _QWEN3 | _sizes(2560, 36, 32, 8, 9728, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": _QWEN3 | _sizes(4096, 36, 32, 8, 12288),
    "Qwen/Qwen3-14B": _QWEN3 | _sizes(5120, 40, 40, 8, 17408),
    "Qwen/Qwen3-32B": _QWEN3 | _sizes(5120, 64, 64, 8, 25600),
    "Qwen/Qwen3-30B-A3B": _QWEN3_MOE | _sizes(2048, 48, 32, 4, 6144, moe_intermediate_size=768),
    "Qwen/Qwen3-235B-A22B": _QWEN3_MOE | _sizes(4096, 94, 64, 4, 12288, moe_intermediate_size=1536),
}
"""Hub id -> what its config.json says. A base model has the same shape."""


def published_name(path: str) -> str | None:
    """The key of `PUBLISHED` that a hub id, or a folder with the name of one, stands for."""
    last = Path(path).name.removesuffix("-Base").lower()
    return next((name for name in PUBLISHED if name.split("/")[1].lower() == last), None)


def known_architecture(path: str) -> tuple[Architecture, str]:
    """Of a folder's config.json, else of a published model of that name; and where it was found.

    Raises:
        ConfigError: neither is there, or the folder's config.json cannot be used.
    """
    if Path(path).exists():
        return read_architecture(path), f"{path}/config.json"
    name = published_name(path)
    if name is None:
        raise ConfigError(
            f"model.path: {path} is no folder here, and no model whose shape is known. A folder with nothing but a "
            f"config.json is enough for a plan. Known: {', '.join(PUBLISHED)}"
        )
    return parse_architecture(PUBLISHED[name], Path(name)), f"published shape of {name}"
