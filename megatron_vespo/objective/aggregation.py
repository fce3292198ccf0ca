"""From a loss per token to one number: what the sum is divided by.

Every mode is a numerator (weights on tokens) and a count that add up over ranks and micro-batches, so the division
happens once, over the whole step, and how the step was split changes nothing. That holds for context parallelism too:
`group` is then the ranks among which the positions of each sequence are dealt out.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.objective.importance import per_token, sequence_sum


def token_weights(
    mode: str, response_mask: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Weight of each token in the numerator: [t] bool -> [t] float32."""
    weights = response_mask.float()
    if mode == "sequence_mean_token_mean":
        tokens = per_token(sequence_sum(weights, cu_seqlens, group), cu_seqlens)
        return (weights / tokens.clamp(min=1)).float()
    return weights


def local_count(mode: str, response_mask: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """This call's share of the denominator, an int64 scalar: response tokens, or sequences that have any.

    A sequence that `group` shares is counted by its first rank.
    """
    if mode == "token_mean":
        return response_mask.sum()
    sequences = (sequence_sum(response_mask.float(), cu_seqlens, group) > 0).sum()
    return sequences if group is None or group.rank() == 0 else torch.zeros_like(sequences)


def aggregate(
    per_token_loss: Tensor,
    mode: str,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The numerator: a scalar, differentiable in `per_token_loss`; masked tokens count nothing, even if not finite."""
    weights = token_weights(mode, response_mask, cu_seqlens, group)
    return (torch.where(response_mask, per_token_loss, 0.0) * weights).sum()
