"""What an objective tells beside its loss, in a form that reduces exactly over ranks and micro-batches."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_vespo.objective.importance import LARGEST_LOG_RATIO, log_ratio, ratio
from megatron_vespo.objective.packed import Packed


@dataclass
class LossMetrics:
    """Detached tensors.

    `sums`: scalars that add up over ranks (context-parallel ones too) and micro-batches: a mean is a sum and a count,
    divided at the end.
    `sequences`: one value per packed sequence, [s] float32, in the order of `cu_seqlens`; concatenated, then ordered by
    the sequences' keys, so quantiles are exact. The same on all ranks that share a sequence.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    sequences: dict[str, Tensor] = field(default_factory=dict)


def difference_sums(log_probs: Tensor, other_log_probs: Tensor, response_mask: Tensor) -> dict[str, Tensor]:
    """How far one policy is from `other`, which sampled: [t] each, summed over response tokens.

    With log r = log_probs - other_log_probs: k1 = -log r and k3 = r - 1 - log r estimate KL(other || policy) (Schulman,
    "Approximating KL divergence").
    """
    packed = Packed(response_mask, torch.tensor([0, len(response_mask)], device=response_mask.device))
    log_ratios = log_ratio(log_probs, other_log_probs, packed)
    tokens = {"tokens": torch.count_nonzero(response_mask)}
    return tokens | size_sums(log_ratios) | divergence_sums_(log_ratios.to(torch.float64, copy=True))


def size_sums(log_ratios: Tensor) -> dict[str, Tensor]:
    """[t], 0 outside responses."""
    sizes = log_ratios.abs()
    return {
        "abs_difference": sizes.sum().double(),
        "above_ln2": sizes.sub_(math.log(2)).relu_().sign_().sum().long(),
    }


def divergence_sums_(log_ratios: Tensor) -> dict[str, Tensor]:
    """[t] float64, 0 outside responses; destroyed, because on long batches memory is what a loss costs."""
    total = log_ratios.sum()
    return {"k1": -total, "k3": log_ratios.clamp_(max=LARGEST_LOG_RATIO).expm1_().sum() - total}


def sign_sums(advantages: Tensor, clipped: Tensor | None, tokens: Tensor) -> dict[str, Tensor]:
    """Tokens, and clipped tokens, by the sign of their advantage. All of one shape; `tokens`: how many each stands for."""
    sums = {}
    for sign, chosen in (("positive", advantages > 0), ("negative", advantages < 0)):
        sums[f"{sign}_tokens"] = (chosen * tokens).sum()
        if clipped is not None:
            sums[f"{sign}_clipped"] = (chosen * clipped * tokens).sum()
    return sums


def engine_sums(engine_log_weights: Tensor, packed: Packed) -> dict[str, Tensor]:
    """[t], 0 outside responses."""
    return {
        "engine_weight": packed.zero_outside_(ratio(engine_log_weights)).sum().double(),
        "engine_masked": torch.count_nonzero(torch.isneginf(engine_log_weights)),
    }
