"""Core attention over packed sequences on torch's scaled_dot_product_attention, with context parallelism.

Used where Transformer Engine is missing: Megatron's own DotProductAttention knows no packed sequences.
"""

from itertools import groupby

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention.bias import causal_lower_right


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
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.context_parallel_group = pg_collection.cp
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
        """[t, heads, d], [t, groups, d] twice -> [t, heads, d]. The mask is the packing's, nothing else.

        With context parallelism of size c these are this rank's t / c rows, while `cu_seqlens_q` still bounds the
        sequences in all t rows; see `context_parallel_attention`.
        """
        if packed_seq_params is None:
            raise ValueError("this attention takes packed sequences: packed_seq_params is missing")
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        if self.context_parallel_group.size() == 1:
            return packed_causal_attention(query, key, value, lengths, self.softmax_scale)
        return context_parallel_attention(query, key, value, lengths, self.context_parallel_group, self.softmax_scale)


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
    # Neighbours of one length are one batch: fewer calls, and still no row of padding.
    runs = [(length, sum(run)) for length, run in groupby(lengths)]
    parts = zip(*(x.split([rows for _, rows in runs]) for x in (query, key, value)), strict=True)
    outputs = []
    for (length, _), qkv in zip(runs, parts, strict=True):
        outputs.append(_attention(*(x.unflatten(0, (-1, length)) for x in qkv), scale=scale).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], group: ProcessGroup, scale: float | None = None
) -> Tensor:
    """`packed_causal_attention` with each sequence's rows spread over the ranks of `group` in Megatron's zigzag order.

    Of 2c chunks of a sequence, for a group of c, rank r holds chunk r and behind it chunk 2c - 1 - r: so all ranks have
    as many pairs of query and key. Keys and values of all ranks are gathered; their gradients are summed where they
    came from.

    Args:
        query: [t / c, heads, d]; key, value: [t / c, groups, d], this rank's rows.
        lengths: of the whole sequences, multiples of 2c; their sum is t.

    Returns:
        [t / c, heads, d], in the order of `query`.
    """
    ranks, rank = group.size(), group.rank()
    # One collective for both: [t, 2, groups, d], rank behind rank.
    everywhere = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=group)
    local_lengths = [length // ranks for length in lengths]
    outputs = []
    for queries, pairs in zip(
        query.split(local_lengths),
        everywhere.unflatten(0, (ranks, -1)).split(local_lengths, dim=1),
        strict=True,
    ):
        chunk = queries.shape[0] // 2
        keys, values = _in_order(pairs).unbind(1)
        for number, part in zip((rank, 2 * ranks - 1 - rank), queries.split(chunk), strict=True):
            visible = (number + 1) * chunk
            outputs.append(_attention(part[None], keys[None, :visible], values[None, :visible], scale)[0])
    return torch.cat(outputs)


def _in_order(zigzag: Tensor) -> Tensor:
    """One sequence's rows, [ranks, n / ranks, ...] as the ranks hold them -> [n, ...]."""
    first, second = zigzag.unflatten(1, (2, -1)).unbind(1)
    return torch.cat([*first, *second.flip(0)])


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """[b, n, heads, d], [b, m, groups, d] twice -> [b, n, heads, d]; the queries are those of the last n positions."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    mask = None if query.shape[2] == key.shape[2] else causal_lower_right(query.shape[2], key.shape[2])
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)
