"""Importance weights of whole responses in a packed batch."""

import torch
import torch.distributed as dist
from torch import Tensor


def sequence_lengths(cu_seqlens: Tensor) -> Tensor:
    """Positions of each packed sequence: [s + 1] -> [s] int64."""
    return (cu_seqlens[1:] - cu_seqlens[:-1]).long()


def sequence_sum(values: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of each packed sequence: [t] -> [s] float64. Not differentiable; repeatable on every device.

    `group`: ranks among which the positions of each sequence are dealt out (context parallelism); all call it, and all
    get the sums over all positions.
    """
    sums = torch.segment_reduce(values.detach().double(), "sum", lengths=sequence_lengths(cu_seqlens))
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums


def per_token(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Give each position the value of its sequence: [s] -> [t]."""
    return torch.repeat_interleave(values, sequence_lengths(cu_seqlens))


def sequence_log_weight(
    log_probs: Tensor,
    old_log_probs: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """log W of each response: sum over its tokens of log(current / old policy). [t] -> [s] float64, detached.

    A product over the whole response, never length-normalised and never clamped per token (VESPO, arXiv 2602.10693).
    """
    difference = log_probs.detach().double() - old_log_probs.double()
    return sequence_sum(torch.where(response_mask, difference, 0.0), cu_seqlens, group)
