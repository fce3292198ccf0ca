"""Attention over several ranks: what each of them is asked to do."""

from types import SimpleNamespace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vespo.config import LayoutConfig, PolicyConfig
from megatron_vespo.policy import parallel
from megatron_vespo.policy.attention import PackedAttention
from megatron_vespo.policy.device import prepare_device
from megatron_vespo.rendezvous import listen


def attend(
    rank: int,
    world_size: int,
    port: int,
    rows: list[Tensor],
    tensors: list[Tensor],
    lengths: list[int],
    scale: float | None,
    recompute: bool,
) -> list[Tensor]:
    """This rank's output and gradients of query, key and value.

    `rows[rank]`: which rows of the packed `tensors` (query, key, value, gradient of the output) this rank holds.
    """
    parallel.join(
        prepare_device("float32"),
        PolicyConfig(ranks=world_size, layout=LayoutConfig(cp=world_size), step_timeout_seconds=60),
        rank=rank,
        world_size=world_size,
        master=listen("127.0.0.1", port) if rank == 0 else ("127.0.0.1", port),
        seed=1,
    )
    try:
        query, key, value, gradient = (x[rows[rank]] for x in tensors)
        leaves = [x.requires_grad_() for x in (query, key, value)]
        output = _through_megatron(leaves, lengths, scale, recompute)
        output.backward(gradient)
        return [output.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]
    finally:
        parallel.leave()


def _through_megatron(qkv: list[Tensor], lengths: list[int], scale: float | None, recompute: bool) -> Tensor:
    """As Megatron's SelfAttention calls its core attention, directly or to be recomputed in the backward pass."""
    heads, width = qkv[0].shape[1:]
    config = TransformerConfig(num_layers=1, hidden_size=heads * width, num_attention_heads=heads)
    core = PackedAttention(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type=None,
        softmax_scale=scale,
        pg_collection=None,
    )
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packing = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
    options = {"attn_mask_type": AttnMaskType.causal, "attention_bias": None, "packed_seq_params": packing}
    if recompute:
        layer = SimpleNamespace(core_attention=core, attn_mask_type=AttnMaskType.causal)
        return Attention._checkpointed_attention_forward(layer, *qkv, None, **options)  # type: ignore[arg-type]
    return core(*qkv, None, **options)
