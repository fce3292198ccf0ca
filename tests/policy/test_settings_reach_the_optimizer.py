"""Which parameters decay, and which schedules are refused."""

import pytest

from megatron_vespo.config import OptimizerConfig
from megatron_vespo.policy.optimizer import is_exempt

DEFAULT = OptimizerConfig().weight_decay_exempt


@pytest.mark.parametrize(
    ("name", "exempt"),
    [
        ("module.embedding.word_embeddings.weight", False),
        ("module.module.decoder.layers.0.mlp.router.weight", False),
        ("module.decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight", False),
        ("module.decoder.layers.0.input_layernorm.weight", True),
        ("module.decoder.layers.0.self_attention.q_layernorm.weight", True),
        ("module.decoder.final_layernorm.weight", True),
        ("module.decoder.layers.0.self_attention.linear_qkv.bias", True),
        ("module.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", True),
        ("module.decoder.layers.0.mlp.linear_fc1.layer_norm_weight", True),
        ("module.decoder.layers.0.self_attention.linear_qkv.weight", False),
    ],
)
def test_default_exemptions_are_the_norms_in_both_layer_implementations(name, exempt):
    assert is_exempt(name, DEFAULT) is exempt


def test_patterns_see_names_without_wrappers():
    assert is_exempt("module.module.embedding.word_embeddings.weight", ("embedding.*",))
    assert not is_exempt("module.output_layer.weight", ("embedding.*",))
