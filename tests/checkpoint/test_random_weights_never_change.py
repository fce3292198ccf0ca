"""A seed gives the weights that it has always given: bases that others built from it can be built again."""

import pytest
from layout_jobs import initialised_fingerprint

from megatron_vespo.architecture.hf_config import Architecture

ARCHITECTURE = {
    "architecture": "Qwen3MoeForCausalLM",
    "vocab_size": 97,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 16,
    "qk_norm": True,
    "ffn_hidden_size": 48,
    "moe_layers": (True, True),
    "num_experts": 4,
    "experts_per_token": 2,
    "moe_ffn_hidden_size": 24,
    "norm_epsilon": 1e-5,
    "rotary_base": 5000.0,
    "rope_scaling_factor": None,
    "normalise_topk": True,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("dtype", "tied", "expected"),
    [
        ("float32", False, "d2ae5685d9a28e72a382b0ae9c49f0e90d9dd4ebc495adbd4a304febf2694813"),
        ("float32", True, "c39d61dcf49ee7cba53e98cc5255c93e3b2921f94c74158c4365192ffd1a0f65"),
        ("bfloat16", False, "4741eec3179f37dee76c0cea9f99839e7764b1534b69d873ddd54c920de90259"),
    ],
)
def test_a_moe_model_of_one_process(ranks, dtype, tied, expected):
    """Fingerprints as of the first version of `policy.initialise` (sha256 of names and bytes, seed 7)."""
    architecture = Architecture(**ARCHITECTURE, tied_embeddings=tied)
    assert ranks.run(1, initialised_fingerprint, architecture, dtype) == [expected]
