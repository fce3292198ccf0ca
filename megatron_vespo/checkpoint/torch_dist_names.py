"""Where the mapping table's parameters stand in a Megatron-Core `torch_dist` checkpoint. No torch, no Megatron.

A checkpoint is a set of named global tensors, the same whatever layout wrote it (transformer_block.py, mlp.py and
experts.py, `sharded_state_dict`): vocabulary rows filled up with zeros, queries, keys and values interleaved by group,
all gate rows before all up rows, and a layer's experts stacked along a first axis. Layers have keys of their own
(metadata `non_homogeneous_layers`), or, in models of equal layers saved without it, are stacked along another first axis.
"""

from typing import NamedTuple

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.mapping import Place, Shape, Sharding

CONTENT_METADATA = {"non_homogeneous_layers": True, "singleton_local_shards": False}
"""How our keys are spelled, for `sharded_state_dict(metadata=...)`; `dist_checkpointing.load_content_metadata` reads it."""

LAYER = "decoder.layers.{layer}."
STACKED_LAYERS = "decoder.layers."
MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
"""How every key of a GPTModel's weights begins."""
EXTRA_STATE = "._extra_state/"


class Region(NamedTuple):
    """The part of the global tensor `key` that is one parameter: tensor[index]."""

    key: str
    index: tuple[int, ...]
    shape: Shape
    """Of the global tensor."""


def regions(place: Place, architecture: Architecture, vocabulary_rows: int) -> list[Region]:
    """Every region under which a parameter is written."""
    shape = place.entry.megatron_shape
    if place.entry.sharding is Sharding.VOCABULARY:
        shape = (vocabulary_rows, *shape[1:])
    index: tuple[int, ...] = ()
    if place.expert is not None:
        index, shape = (place.expert,), (architecture.num_experts, *shape)
    patterns = place.entry.checkpoint or place.entry.megatron[:1]
    return [Region(pattern.format(layer=place.layer), index, shape) for pattern in patterns]


def readable_regions(place: Place, architecture: Architecture, vocabulary_rows: int) -> list[Region]:
    """Every region from which it can be read: also those of checkpoints that stack the layers."""
    own = regions(place, architecture, vocabulary_rows)
    if place.layer is None:
        return own
    prefix = LAYER.format(layer=place.layer)
    stacked = [
        Region(key.replace(prefix, STACKED_LAYERS), (place.layer, *index), (architecture.num_layers, *shape))
        for key, index, shape in own
    ]
    return own + stacked


def extra_state_keys(architecture: Architecture) -> list[str]:
    """Keys of modules' extra states, which hold nothing without fp8, but which a model asks for when it loads.

    Those of the local spec (tested) and, as far as its source tells, of Transformer Engine's.
    """
    attention = ["linear_qkv", "linear_proj", "core_attention"]
    attention += ["q_layernorm", "k_layernorm"] if architecture.qk_norm else []
    keys = ["decoder.final_layernorm" + EXTRA_STATE + "shard_0_1"]
    for layer, moe in enumerate(architecture.moe_layers):
        prefix = LAYER.format(layer=layer)
        modules = [f"self_attention.{name}" for name in attention]
        modules += ["pre_mlp_layernorm"] if moe else ["mlp.linear_fc1", "mlp.linear_fc2"]
        keys += [f"{prefix}{module}{EXTRA_STATE}shard_0_1" for module in modules]
        for expert in range(architecture.num_experts if moe else 0):
            keys += [
                f"{prefix}mlp.experts.experts.{name}{EXTRA_STATE}shard_{expert}_{architecture.num_experts}"
                for name in ("linear_fc1", "linear_fc2")
            ]
    return keys
