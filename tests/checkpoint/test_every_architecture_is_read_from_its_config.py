"""Dense, mixed and Llama models: their config.json is read as transformers reads it, or refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from tiny_models import KINDS, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_vespo.architecture.hf_config import Architecture, read_architecture
from megatron_vespo.config import ConfigError

QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
"""Both as published (transformers 4.51 and 4.45)."""

QWEN3_0_6B_READ = Architecture(
    architecture="Qwen3ForCausalLM",
    vocab_size=151936,
    hidden_size=1024,
    num_layers=28,
    num_attention_heads=16,
    num_query_groups=8,
    head_dim=128,
    qk_norm=True,
    ffn_hidden_size=3072,
    moe_layers=(False,) * 28,
    num_experts=0,
    experts_per_token=0,
    moe_ffn_hidden_size=0,
    norm_epsilon=1e-6,
    rotary_base=1e6,
    rope_scaling_factor=None,
    tied_embeddings=True,
    normalise_topk=False,
    max_position_embeddings=40960,
)
LLAMA_3_2_1B_READ = replace(
    QWEN3_0_6B_READ,
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=2048,
    num_layers=16,
    num_attention_heads=32,
    head_dim=64,
    qk_norm=False,
    ffn_hidden_size=8192,
    moe_layers=(False,) * 16,
    norm_epsilon=1e-5,
    rotary_base=5e5,
    rope_scaling_factor=32.0,
    max_position_embeddings=131072,
)


def write(folder: Path, values: dict) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def refusal(folder: Path, values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        read_architecture(write(folder, values))
    return str(caught.value)


def test_published_dense_configs_are_read(tmp_path):
    assert read_architecture(write(tmp_path, QWEN3_0_6B)) == QWEN3_0_6B_READ
    assert read_architecture(write(tmp_path, LLAMA_3_2_1B)) == LLAMA_3_2_1B_READ
    assert not LLAMA_3_2_1B_READ.is_moe


@pytest.mark.parametrize(("published", "expected"), [(QWEN3_0_6B, QWEN3_0_6B_READ), (LLAMA_3_2_1B, LLAMA_3_2_1B_READ)])
def test_transformers_5_writes_them_differently_and_they_are_read_alike(tmp_path, published, expected):
    AutoConfig.from_pretrained(write(tmp_path, published)).save_pretrained(tmp_path)
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in rewritten
    assert "rope_theta" not in rewritten
    assert read_architecture(tmp_path) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mlp_only_layers": [0, 5]},
        {"decoder_sparse_step": 2},
        {"decoder_sparse_step": 3, "mlp_only_layers": [2]},
        {"mlp_only_layers": None},
    ],
)
def test_layers_are_moe_where_transformers_builds_experts(tmp_path, settings):
    config = tiny_config("moe", layers=6)
    for key, value in settings.items():
        setattr(config, key, value)
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["Qwen3MoeForCausalLM"]}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(write(tmp_path, values)))
    expected = tuple(hasattr(layer.mlp, "experts") for layer in model.model.layers)
    architecture = read_architecture(tmp_path)
    assert architecture.moe_layers == expected
    assert architecture.is_moe


@pytest.mark.parametrize("kind", KINDS)
def test_rotary_frequencies_are_transformers(tmp_path, kind):
    config = tiny_config(kind)
    config.save_pretrained(tmp_path)
    names = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
    values = json.loads((tmp_path / "config.json").read_text())
    a = read_architecture(write(tmp_path, values | {"architectures": [names.get(kind, "Qwen3MoeForCausalLM")]}))
    if kind == "llama":
        expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    else:
        expected = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, 16, 2) / 16)
    found = RotaryEmbedding(
        kv_channels=a.head_dim,
        rotary_percent=1.0,
        rotary_base=a.rotary_base,  # type: ignore[arg-type]
        rope_scaling=a.rope_scaling_factor is not None,
        rope_scaling_factor=a.rope_scaling_factor or 1.0,
        use_cpu_initialization=True,
    ).inv_freq
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_scaling": LLAMA_3_2_1B["rope_scaling"] | {"low_freq_factor": 2.0}},
            "rope_scaling.low_freq_factor: 2.0",
        ),
        ({"rope_scaling": LLAMA_3_2_1B["rope_scaling"] | {"high_freq_factor": 8}}, "rope_scaling.high_freq_factor: 8 "),
        (
            {"rope_scaling": LLAMA_3_2_1B["rope_scaling"] | {"original_max_position_embeddings": 4096}},
            "rope_scaling.original_max_position_embeddings: 4096 is not supported with rope_type 'llama3', only 8192",
        ),
        ({"original_max_position_embeddings": 4096}, "original_max_position_embeddings: 4096"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor: None"),
        ({"rope_scaling": LLAMA_3_2_1B["rope_scaling"] | {"factor": 0}}, "rope_scaling.factor: expected a positive"),
        ({"rope_scaling": {"type": "dynamic", "factor": 8.0}}, "('dynamic') is not supported, only 'default' and 'lla"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, "both are given and differ"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"pretraining_tp": 2}, "pretraining_tp: 2 is not supported, only 1"),
        ({"num_key_value_heads": None}, "num_key_value_heads: missing"),
    ],
)
def test_what_would_be_computed_wrongly_of_a_llama_is_refused(tmp_path, change, message):
    assert message in refusal(tmp_path, LLAMA_3_2_1B | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": None}, "head_dim: missing"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: 'sliding_attention' not supported"),
        ({"intermediate_size": -1}, "intermediate_size: expected a positive integer, found -1"),
    ],
)
def test_what_would_be_computed_wrongly_of_a_dense_qwen3_is_refused(tmp_path, change, message):
    assert message in refusal(tmp_path, QWEN3_0_6B | change)


def test_all_mistakes_are_told_at_once(tmp_path):
    changes = {"mlp_bias": True, "pretraining_tp": 4, "vocab_size": None, "rms_norm_eps": 0}
    message = refusal(tmp_path, LLAMA_3_2_1B | changes | {"rope_scaling": {"type": "yarn"}})
    assert all(key in message for key in (*changes, "yarn"))
