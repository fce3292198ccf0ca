"""Entries that decoders of the Llama kind have in common: no biases, RMSNorm, gated feed-forward layers.

Hugging Face names are those of the hub's folders, one tensor per expert and projection. transformers 5 stacks the
experts in memory and takes them apart again when it saves, so its folders have these names too.
"""

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.mapping import Entry, Form, Layers, Sharding, Table

MEGATRON_LAYER = "decoder.layers.{layer}."
MEGATRON_LOCAL_EXPERT = MEGATRON_LAYER + "mlp.experts.local_experts.{expert}."
MEGATRON_GROUPED_EXPERTS = MEGATRON_LAYER + "mlp.experts."
HF_LAYER = "model.layers.{layer}."
HF_EXPERT = HF_LAYER + "mlp.experts.{expert}."


def decoder_table(a: Architecture, *, attention: tuple[Entry, ...], feed_forward: tuple[Entry, ...]) -> Table:
    return Table(
        entries=(*_outside_layers(a), *attention, _feed_forward_norm(a), *feed_forward),
        duplicates={"lm_head.weight": "model.embed_tokens.weight"} if a.tied_embeddings else {},
    )


def _outside_layers(a: Architecture) -> tuple[Entry, ...]:
    vocabulary = (a.vocab_size, a.hidden_size)
    norm = _replicated("model.norm.weight", (a.hidden_size,), "decoder.final_layernorm.weight")
    embedding = ("model.embed_tokens.weight", vocabulary, "embedding.word_embeddings.weight")
    if a.tied_embeddings:  # with pipeline stages, the last one holds a copy of the embedding as its output layer
        return _whole(*embedding, "output_layer.weight", sharding=Sharding.VOCABULARY), norm
    output = _whole("lm_head.weight", vocabulary, "output_layer.weight", sharding=Sharding.VOCABULARY)
    return _whole(*embedding, sharding=Sharding.VOCABULARY), norm, output


def attention_entries(a: Architecture, *, qk_norm: bool) -> tuple[Entry, ...]:
    """With the norm before it; `qk_norm`: queries and keys have norms too."""
    query, key = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    megatron, hf = MEGATRON_LAYER + "self_attention.", HF_LAYER + "self_attn."
    qk_norms = (
        _replicated(hf + "q_norm.weight", (a.head_dim,), megatron + "q_layernorm.weight"),
        _replicated(hf + "k_norm.weight", (a.head_dim,), megatron + "k_layernorm.weight"),
    )
    return (
        _replicated(
            HF_LAYER + "input_layernorm.weight",
            (a.hidden_size,),
            MEGATRON_LAYER + "input_layernorm.weight",
            megatron + "linear_qkv.layer_norm_weight",  # fused in Transformer Engine's spec
            checkpoint=(megatron + "linear_qkv.layer_norm_weight",),
        ),
        Entry(
            megatron=(megatron + "linear_qkv.weight",),
            form=Form.QKV,
            hf={
                hf + "q_proj.weight": (query, a.hidden_size),
                hf + "k_proj.weight": (key, a.hidden_size),
                hf + "v_proj.weight": (key, a.hidden_size),
            },
            sharding=Sharding.ROWS,
        ),
        *(qk_norms if qk_norm else ()),
        _whole(
            hf + "o_proj.weight",
            (a.hidden_size, query),
            megatron + "linear_proj.weight",
            sharding=Sharding.COLUMNS,
        ),
    )


def _feed_forward_norm(a: Architecture) -> Entry:
    own, fused = MEGATRON_LAYER + "pre_mlp_layernorm.weight", MEGATRON_LAYER + "mlp.linear_fc1.layer_norm_weight"
    return _replicated(
        HF_LAYER + "post_attention_layernorm.weight",
        (a.hidden_size,),
        own,
        fused,  # in Transformer Engine's dense layers
        checkpoint=(own, fused),  # of MoE layers, Transformer Engine's spec reads the first, the local spec the second
    )


def dense_entries(a: Architecture) -> tuple[Entry, ...]:
    return _gated(
        HF_LAYER + "mlp.",
        (a.hidden_size, a.ffn_hidden_size),
        fc1=(MEGATRON_LAYER + "mlp.linear_fc1.weight",),
        fc2=(MEGATRON_LAYER + "mlp.linear_fc2.weight",),
        layers=Layers.DENSE,
    )


def expert_entries(a: Architecture) -> tuple[Entry, ...]:
    """With their router."""
    return (
        _whole(
            HF_LAYER + "mlp.gate.weight",
            (a.num_experts, a.hidden_size),
            MEGATRON_LAYER + "mlp.router.weight",
            sharding=Sharding.REPLICATED,
            layers=Layers.MOE,
        ),
        *_gated(
            HF_EXPERT,
            (a.hidden_size, a.moe_ffn_hidden_size),
            fc1=(MEGATRON_LOCAL_EXPERT + "linear_fc1.weight", MEGATRON_GROUPED_EXPERTS + "linear_fc1.weight{expert}"),
            fc2=(MEGATRON_LOCAL_EXPERT + "linear_fc2.weight", MEGATRON_GROUPED_EXPERTS + "linear_fc2.weight{expert}"),
            layers=Layers.MOE,
            checkpoint=MEGATRON_GROUPED_EXPERTS + "experts.",
        ),
    )


def _gated(
    hf: str,
    sizes: tuple[int, int],
    *,
    fc1: tuple[str, ...],
    fc2: tuple[str, ...],
    layers: Layers,
    checkpoint: str | None = None,
) -> tuple[Entry, ...]:
    """Gate and up, stacked, and down, of `sizes` (model's width, inner width). `checkpoint`: prefix of stacked experts."""
    hidden, inner = sizes
    keys = [(f"{checkpoint}linear_fc{number}.weight",) if checkpoint else () for number in (1, 2)]
    return (
        Entry(
            megatron=fc1,
            form=Form.STACKED,
            hf={hf + "gate_proj.weight": (inner, hidden), hf + "up_proj.weight": (inner, hidden)},
            sharding=Sharding.ROWS,
            layers=layers,
            checkpoint=keys[0],
        ),
        _whole(
            hf + "down_proj.weight",
            (hidden, inner),
            *fc2,
            sharding=Sharding.COLUMNS,
            layers=layers,
            checkpoint=keys[1],
        ),
    )


def _replicated(hf_name: str, shape: tuple[int, ...], *megatron: str, checkpoint: tuple[str, ...] = ()) -> Entry:
    return _whole(hf_name, shape, *megatron, sharding=Sharding.REPLICATED, checkpoint=checkpoint)


def _whole(
    hf_name: str,
    shape: tuple[int, ...],
    *megatron: str,
    sharding: Sharding,
    layers: Layers = Layers.ALL,
    checkpoint: tuple[str, ...] = (),
) -> Entry:
    return Entry(megatron, Form.WHOLE, {hf_name: shape}, sharding, layers, checkpoint)
