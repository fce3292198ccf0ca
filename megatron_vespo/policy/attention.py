"""Core attention over packed sequences on torch's scaled_dot_product_attention.

Used where Transformer Engine is missing: Megatron's own DotProductAttention knows no packed sequences.
"""

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PackedAttention(MegatronModule):
    """Causal self-attention within each packed sequence; grouped key/value heads. Has no parameters.

    The constructor's arguments are those that Megatron's SelfAttention hands to its core attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"only causal attention is computed here, asked for {attn_mask_type}")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[t, heads, d], [t, groups, d] twice -> [t, heads, d]. The mask is the packing's, nothing else."""
        if packed_seq_params is None:
            raise ValueError("this attention takes packed sequences: packed_seq_params is missing")
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        return packed_causal_attention(query, key, value, lengths, self.softmax_scale)


def packed_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None = None
) -> Tensor:
    """Each sequence attends to itself, causally.

    Args:
        query: [t, heads, d]; key, value: [t, groups, d] with heads a multiple of groups.
        lengths: of the sequences; their sum is t.
        scale: of the scores; None: 1 / sqrt(d).

    Returns:
        [t, heads, d]. A sequence's rows don't depend on what it is packed with, bit for bit.
    """
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    per_sequence = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(
            *(x.transpose(0, 1).unsqueeze(0) for x in one_sequence), is_causal=True, scale=scale
        )
        .squeeze(0)
        .transpose(0, 1)
        for one_sequence in per_sequence
    ]
    return torch.cat(outputs)
