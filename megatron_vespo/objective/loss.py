"""The policy-gradient loss of a packed batch: kernel coefficient x advantage x log-prob, aggregated."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.config import ObjectiveConfig
from megatron_vespo.objective.aggregation import aggregate, local_count
from megatron_vespo.objective.importance import per_token, sequence_log_weight
from megatron_vespo.objective.metrics import LossMetrics
from megatron_vespo.objective.vespo import vespo_coefficients


def policy_loss(
    config: ObjectiveConfig,
    *,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    denominator: Tensor | int | None = None,
    context_parallel_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, LossMetrics]:
    """Loss whose gradient is that of -E[phi(W) A log pi].

    Args:
        log_probs: [t] float32, current policy, of each position's label; the only input with a gradient.
        old_log_probs: [t] float32, the old policy (mu); anything where `response_mask` is False.
        advantages: [s] one for each packed sequence.
        response_mask: [t] bool, True on labels that are response tokens.
        cu_seqlens: [s + 1] int32, bounds of the sequences.
        denominator: of the whole step; None: this call's own count (`aggregation.local_count`).
        context_parallel_group: ranks among which the positions of each sequence are dealt out: all else that is [t]
            holds this rank's, and `cu_seqlens` bounds them. All ranks of the group call this together, and the loss of
            the sequences is the sum of theirs.

    Returns:
        A scalar, and metrics that add up over ranks and micro-batches.
    """
    group = context_parallel_group
    log_weight = sequence_log_weight(log_probs, old_log_probs, response_mask, cu_seqlens, group)
    phi = vespo_coefficients(log_weight, advantages, config)
    coefficient = per_token(phi * advantages.double(), cu_seqlens).float()
    numerator = aggregate(-coefficient * log_probs, config.aggregation, response_mask, cu_seqlens, group)
    if denominator is None:
        denominator = local_count(config.aggregation, response_mask, cu_seqlens, group).clamp(min=1)
    metrics = difference_metrics(log_probs, old_log_probs, response_mask)
    metrics.sequences = {"log_weight": log_weight.float(), "phi": phi.float()}
    return numerator / denominator, metrics


def difference_metrics(log_probs: Tensor, old_log_probs: Tensor, response_mask: Tensor) -> LossMetrics:
    """Sums over response tokens of how far the current policy is from the old one (which sampled them).

    With r = current / old: k1 = -log r and k3 = r - 1 - log r estimate KL(old || current)
    (Schulman, "Approximating KL divergence").
    """
    log_ratio = (log_probs.detach().double() - old_log_probs.double())[response_mask]
    return LossMetrics(
        sums={
            "tokens": response_mask.sum(),
            "abs_difference": log_ratio.abs().sum(),
            "k1": -log_ratio.sum(),
            "k3": (torch.expm1(log_ratio) - log_ratio).sum(),
            "above_ln2": (log_ratio.abs() > math.log(2)).sum(),
            "old_entropy": -old_log_probs.double()[response_mask].sum(),
        }
    )


def demonstration_loss(log_probs: Tensor, response_mask: Tensor) -> tuple[Tensor, LossMetrics]:
    """Summed cross-entropy of supervised training; the denominator is the number of response tokens."""
    numerator = -torch.where(response_mask, log_probs, 0.0).sum()
    return numerator, LossMetrics(sums={"tokens": response_mask.sum()})
