"""From a loss per token to one number: what the sum is divided by.

Every mode is a numerator (weights on tokens) and a count that add up over ranks and micro-batches, so the division
happens once, over the whole step, and how the step was split changes nothing. That holds for context parallelism too:
`group` is then the ranks among which the positions of each sequence are dealt out.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.config.objective import ObjectiveConfig
from megatron_vespo.objective.packed import Packed, over_group


def sequence_weights(config: ObjectiveConfig, lengths: Tensor) -> Tensor:
    """Weight of each token of a sequence in the numerator: [s] float64. `lengths`: [s] response tokens.

    token_mean and sequence_mean_token_sum: 1. sequence_mean_token_mean: 1 / its response's length (GRPO's mean over
    each response). constant_length: 1 / `config.constant_length` (Dr. GRPO, arXiv 2503.20783).
    """
    if config.aggregation == "sequence_mean_token_mean":
        return 1.0 / lengths.clamp(min=1)
    if config.aggregation == "constant_length":
        if config.constant_length is None:
            raise ValueError("aggregation: constant_length needs objective.constant_length")
        return torch.full_like(lengths, 1.0 / config.constant_length)
    return torch.ones_like(lengths)


def local_count(mode: str, response_mask: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """This call's share of the denominator, an int64 scalar: response tokens, or sequences that have any.

    A sequence that `group` shares is counted by its first rank.
    """
    if mode == "token_mean":
        return torch.count_nonzero(response_mask)
    lengths = Packed(response_mask, cu_seqlens).count()
    return count_of(mode, lengths, over_group(lengths.clone(), group), group)


def count_of(mode: str, local_lengths: Tensor, lengths: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`local_count` of known response tokens of each sequence, here and on all ranks of `group`: [s] each."""
    if mode == "token_mean":
        return local_lengths.sum().long()
    sequences = torch.count_nonzero(lengths)
    return sequences if group is None or group.rank() == 0 else torch.zeros_like(sequences)
