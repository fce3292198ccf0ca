"""What an objective tells beside its loss, in a form that reduces exactly over ranks and micro-batches."""

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.objective.importance import LARGEST_LOG_RATIO, log_ratio, ratio
from megatron_vespo.objective.kernels import KernelInputs
from megatron_vespo.objective.packed import Packed, over_group
from megatron_vespo.objective.surrogate import Surrogate


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


def measured(
    inputs: KernelInputs, surrogate: Surrogate, old_log_probs: Tensor, group: dist.ProcessGroup | None
) -> LossMetrics:
    """Of the kernel and its weights. Under context parallelism all ranks of `group` call this."""
    old = inputs.packed.responses(old_log_probs, inputs.log_ratio.dtype).sum().double()
    sums = {"tokens": inputs.packed.lengths.sum().long(), "old_entropy": -old}
    sums |= difference_sums(inputs.log_ratio) | _sign_sums(inputs, surrogate)
    tokens = inputs.lengths.clamp(min=1)
    if surrogate.of_tokens:
        columns = (surrogate.phi, surrogate.pull.abs(), inputs.token_advantages())
        totals = over_group(torch.stack([inputs.packed.sum(column) for column in columns]), group)
        phi, moved, advantage = totals[0] / tokens, totals[1], totals[2] / tokens
    else:
        phi, moved, advantage = surrogate.phi, surrogate.pull.abs() * inputs.lengths, inputs.advantages
    sequences = torch.stack([inputs.log_weight, phi, advantage, inputs.lengths, moved]).float()
    names = ("log_weight", "phi", "advantage", "tokens", "abs_phi_advantage")
    return LossMetrics(sums, dict(zip(names, sequences, strict=True)))


def gradient_mass(metrics: LossMetrics) -> Tensor:
    """[2] float64: sums, over sequences with a response token in the loss, of the mean abs(phi A) of their tokens and of
    abs(A). One divided by the other is the share of the gradient that the kernel lets through (`gradient/log_kept`)."""
    names = ("abs_phi_advantage", "tokens", "advantage")
    moved, tokens, advantage = (metrics.sequences[name].double() for name in names)
    return torch.stack([(moved / tokens.clamp(min=1)).sum(), advantage[tokens > 0].abs().sum()])


def measured_difference(log_probs: Tensor, other_log_probs: Tensor, response_mask: Tensor) -> dict[str, Tensor]:
    """How far one policy is from `other`, which sampled: [t] each, in sums like those of `LossMetrics`."""
    packed = Packed(response_mask, torch.tensor([0, len(response_mask)], device=response_mask.device))
    sums = difference_sums(log_ratio(log_probs, other_log_probs, packed))
    return sums | {"tokens": torch.count_nonzero(response_mask)}


def difference_sums(log_ratios: Tensor) -> dict[str, Tensor]:
    """Sums of log r, r = current / old, where old sampled: [t], 0 outside responses.

    k1 = -log r and k3 = r - 1 - log r estimate KL(old || current) (Schulman, "Approximating KL divergence").
    """
    sizes = log_ratios.abs()
    found = {
        "abs_difference": sizes.sum().double(),
        "above_ln2": sizes.sub_(math.log(2)).relu_().sign_().sum().long(),
    }
    del sizes
    wide = log_ratios.to(torch.float64, copy=True)
    total = wide.sum()
    return found | {"k1": -total, "k3": wide.clamp_(max=LARGEST_LOG_RATIO).expm1_().sum() - total}


def _sign_sums(inputs: KernelInputs, surrogate: Surrogate) -> dict[str, Tensor]:
    """Tokens, and clipped tokens, by the sign of their advantage."""
    advantages = inputs.token_advantages() if surrogate.of_tokens else inputs.advantages
    tokens = inputs.packed.response_mask if surrogate.of_tokens else inputs.packed.lengths
    sums = {}
    for sign, chosen in (("positive", advantages > 0), ("negative", advantages < 0)):
        sums[f"{sign}_tokens"] = (chosen * tokens).sum()
        if surrogate.clipped is not None:
            sums[f"{sign}_clipped"] = (chosen * surrogate.clipped * tokens).sum()
    return sums


def engine_sums(engine_log_weights: Tensor, packed: Packed) -> dict[str, Tensor]:
    """[t], 0 outside responses."""
    return {
        "engine_weight": packed.zero_outside_(ratio(engine_log_weights)).sum().double(),
        "engine_masked": torch.count_nonzero(torch.isneginf(engine_log_weights)),
    }
