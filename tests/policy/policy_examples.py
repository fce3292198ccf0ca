"""Small models and sequences that tests share."""

import numpy as np

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.packing.batch import TrainingSequence

VOCABULARY = 97


def architecture(**changes) -> Architecture:
    values = {
        "architecture": "Qwen3MoeForCausalLM",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 16,
        "ffn_hidden_size": 48,
        "num_experts": 4,
        "experts_per_token": 2,
        "moe_ffn_hidden_size": 24,
        "norm_epsilon": 1e-5,
        "rotary_base": 5000.0,
        "tied_embeddings": False,
        "normalise_topk": True,
        "max_position_embeddings": 128,
        "qk_norm": True,
        "rope_scaling_factor": None,
    }
    values["moe_layers"] = (True,) * (values | changes)["num_layers"]
    return Architecture(**(values | changes))


def sequences(lengths: list[int], seed: int = 0, masked: tuple[int, ...] = ()) -> list[TrainingSequence]:
    """Random tokens; a prompt of a third is not trained on, nor is anything of the keys in `masked`."""
    random = np.random.default_rng(seed)
    made = []
    for key, tokens in enumerate(lengths):
        label_mask = np.arange(tokens - 1) >= tokens // 3
        made.append(
            TrainingSequence(
                token_ids=random.integers(0, VOCABULARY, tokens).astype(np.int32),
                label_mask=label_mask & (key not in masked),
                old_log_probs=np.zeros(tokens - 1, dtype=np.float32),
                advantage=float(random.normal()),
                key=key,
            )
        )
    return made
