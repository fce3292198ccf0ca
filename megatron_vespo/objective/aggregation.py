"""From a loss per token to one number: what the sum is divided by.

Every mode is a numerator (weights on tokens) and a count that add up over ranks and micro-batches, so the division
happens once, over the whole step, and how the step was split changes nothing. That holds for context parallelism too:
`group` is then the ranks among which the positions of each sequence are dealt out.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.config.objective import ObjectiveConfig
from megatron_vespo.objective.kernels import KernelInputs
from megatron_vespo.objective.packed import Packed, over_group


def sequence_weights(config: ObjectiveConfig, inputs: KernelInputs) -> Tensor | None:
    """Weight of each token of a sequence in the numerator: [s] float64; None: 1.

    token_mean and sequence_mean_token_sum: 1. sequence_mean_token_mean: 1 / its response's length (GRPO's mean over
    each response). constant_length: 1 / `config.constant_length` (Dr. GRPO, arXiv 2503.20783).
    """
    if config.aggregation == "sequence_mean_token_mean":
        return 1.0 / inputs.lengths.clamp(min=1)
    if config.aggregation == "constant_length":
        if config.constant_length is None:
            raise ValueError("aggregation: constant_length needs objective.constant_length")
        return torch.full_like(inputs.log_weight, 1.0 / config.constant_length)
    return None


def local_count(mode: str, response_mask: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """This call's share of the denominator, an int64 scalar: response tokens, or sequences that have any.

    A sequence that `group` shares is counted by its first rank.
    """
    if mode == "token_mean":
        return torch.count_nonzero(response_mask)
    return sequences_with_tokens(over_group(Packed(response_mask, cu_seqlens).lengths, group), group)


def sequences_with_tokens(lengths: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """How many of `lengths` [s] are not 0; 0 on all ranks of `group` but the first."""
    sequences = torch.count_nonzero(lengths)
    return sequences if group is None or group.rank() == 0 else torch.zeros_like(sequences)
