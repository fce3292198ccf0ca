"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): every layer is MoE, q and k are normalised per head, no biases.

Hugging Face names are those of the hub's folders, one tensor per expert and projection. transformers 5 stacks the
experts in memory and takes them apart again when it saves, so its folders have these names too.
"""

from megatron_vespo.checkpoint.hf_config import Architecture
from megatron_vespo.checkpoint.mapping import Entry, Form, Table

MEGATRON_LAYER = "decoder.layers.{layer}."
MEGATRON_LOCAL_EXPERT = MEGATRON_LAYER + "mlp.experts.local_experts.{expert}."
MEGATRON_GROUPED_EXPERTS = MEGATRON_LAYER + "mlp.experts."
HF_LAYER = "model.layers.{layer}."
HF_EXPERT = HF_LAYER + "mlp.experts.{expert}."


def table(architecture: Architecture) -> Table:
    return Table(
        entries=(*_outside_layers(architecture), *_attention(architecture), *_experts(architecture)),
        duplicates={"lm_head.weight": "model.embed_tokens.weight"} if architecture.tied_embeddings else {},
    )


def _outside_layers(a: Architecture) -> tuple[Entry, ...]:
    vocabulary = (a.vocab_size, a.hidden_size)
    norm = _whole("model.norm.weight", (a.hidden_size,), "decoder.final_layernorm.weight")
    embedding = ("model.embed_tokens.weight", vocabulary, "embedding.word_embeddings.weight")
    if a.tied_embeddings:  # with pipeline stages, the last one holds a copy of the embedding as its output layer
        return _whole(*embedding, "output_layer.weight"), norm
    return _whole(*embedding), norm, _whole("lm_head.weight", vocabulary, "output_layer.weight")


def _attention(a: Architecture) -> tuple[Entry, ...]:
    query, key = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    megatron, hf = MEGATRON_LAYER + "self_attention.", HF_LAYER + "self_attn."
    return (
        _whole(
            HF_LAYER + "input_layernorm.weight",
            (a.hidden_size,),
            MEGATRON_LAYER + "input_layernorm.weight",
            megatron + "linear_qkv.layer_norm_weight",  # fused in Transformer Engine's spec
        ),
        Entry(
            megatron=(megatron + "linear_qkv.weight",),
            form=Form.QKV,
            hf={
                hf + "q_proj.weight": (query, a.hidden_size),
                hf + "k_proj.weight": (key, a.hidden_size),
                hf + "v_proj.weight": (key, a.hidden_size),
            },
        ),
        _whole(hf + "q_norm.weight", (a.head_dim,), megatron + "q_layernorm.weight"),
        _whole(hf + "k_norm.weight", (a.head_dim,), megatron + "k_layernorm.weight"),
        _whole(hf + "o_proj.weight", (a.hidden_size, query), megatron + "linear_proj.weight"),
    )


def _experts(a: Architecture) -> tuple[Entry, ...]:
    return (
        _whole(
            HF_LAYER + "post_attention_layernorm.weight",
            (a.hidden_size,),
            MEGATRON_LAYER + "pre_mlp_layernorm.weight",
            MEGATRON_LAYER + "mlp.linear_fc1.layer_norm_weight",
        ),
        _whole(
            HF_LAYER + "mlp.gate.weight",
            (a.num_experts, a.hidden_size),
            MEGATRON_LAYER + "mlp.router.weight",
        ),
        Entry(
            megatron=(
                MEGATRON_LOCAL_EXPERT + "linear_fc1.weight",
                MEGATRON_GROUPED_EXPERTS + "linear_fc1.weight{expert}",
            ),
            form=Form.STACKED,
            hf={
                HF_EXPERT + "gate_proj.weight": (a.moe_ffn_hidden_size, a.hidden_size),
                HF_EXPERT + "up_proj.weight": (a.moe_ffn_hidden_size, a.hidden_size),
            },
        ),
        _whole(
            HF_EXPERT + "down_proj.weight",
            (a.hidden_size, a.moe_ffn_hidden_size),
            MEGATRON_LOCAL_EXPERT + "linear_fc2.weight",
            MEGATRON_GROUPED_EXPERTS + "linear_fc2.weight{expert}",
        ),
    )


def _whole(hf_name: str, shape: tuple[int, ...], *megatron: str) -> Entry:
    return Entry(megatron=megatron, form=Form.WHOLE, hf={hf_name: shape})
