"""config.json: both generations of it are read alike, and what we would compute wrongly is refused by name."""

import json
from pathlib import Path

import pytest

from megatron_vespo.architecture.hf_config import SUPPORTED_ARCHITECTURES, Architecture, read_architecture
from megatron_vespo.checkpoint.tables import TABLES
from megatron_vespo.config import ConfigError

QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""As published (transformers 4.51)."""

EXPECTED = Architecture(
    architecture="Qwen3MoeForCausalLM",
    vocab_size=151936,
    hidden_size=2048,
    num_layers=48,
    num_attention_heads=32,
    num_query_groups=4,
    head_dim=128,
    qk_norm=True,
    ffn_hidden_size=6144,
    moe_layers=(True,) * 48,
    num_experts=128,
    experts_per_token=8,
    moe_ffn_hidden_size=768,
    norm_epsilon=1e-6,
    rotary_base=1e6,
    rope_scaling_factor=None,
    tied_embeddings=False,
    normalise_topk=True,
    max_position_embeddings=40960,
)


def write(folder: Path, values: object) -> Path:
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def without(*keys: str) -> dict:
    return {key: value for key, value in QWEN3_30B_A3B.items() if key not in keys}


def test_published_config_is_read(tmp_path):
    assert read_architecture(write(tmp_path, QWEN3_30B_A3B)) == EXPECTED


def test_transformers_5_config_is_read_alike(tmp_path):
    values = without("rope_theta", "rope_scaling", "num_experts") | {
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "num_local_experts": 128,
    }
    assert read_architecture(write(tmp_path, values)) == EXPECTED


def test_head_dim_defaults_to_hidden_size_over_heads(tmp_path):
    assert read_architecture(write(tmp_path, without("head_dim"))).head_dim == 64


def test_each_supported_architecture_has_a_table():
    assert set(SUPPORTED_ARCHITECTURES) == set(TABLES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported: Qwen3MoeForCausalLM"),
        ({"architectures": None}, "architectures: expected a list of one name, found None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: rope scaling ('yarn')"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling: rope scaling ('linear')"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_parameters: rope scaling ('yarn')"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_parameters.rope_theta: expected a pos"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: not supported"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"mlp_only_layers": [48]}, "mlp_only_layers: expected a list of layers, 0 to 47, found [48]"),
        ({"mlp_only_layers": 0}, "mlp_only_layers: expected a list of layers, 0 to 47, found 0"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: expected a positive integer, found 0"),
        ({"decoder_sparse_step": 49}, "leave no MoE layer; such a model is Qwen3ForCausalLM"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"num_experts": "128"}, "num_experts: expected a positive integer, found '128'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer, found 0"),
        ({"num_key_value_heads": 5}, "num_attention_heads: 32 is not a multiple of num_key_value_heads (5)"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok: 129 is more than num_experts (128)"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false, found 'no'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError) as caught:
        read_architecture(write(tmp_path, QWEN3_30B_A3B | change))
    assert message in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "num_experts", "rms_norm_eps", "rope_theta", "moe_intermediate_size"])
def test_missing_field_is_named(tmp_path, key):
    with pytest.raises(ConfigError, match=f"{key}: missing"):
        read_architecture(write(tmp_path, without(key)))


def test_all_mistakes_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_architecture(write(tmp_path, without("vocab_size", "rope_theta") | {"attention_bias": True}))
    assert all(part in str(caught.value) for part in ("vocab_size: missing", "rope_theta: missing", "attention_bias"))


def test_missing_folder_file_and_bad_json_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        read_architecture(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no config\.json in this folder"):
        read_architecture(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json: not readable as JSON"):
        read_architecture(write(tmp_path, '{"architectures": ['))
    with pytest.raises(ConfigError, match="expected a mapping, found list"):
        read_architecture(write(tmp_path, "[]"))
    with pytest.raises(ConfigError, match="this is a file"):
        read_architecture(tmp_path / "config.json")
