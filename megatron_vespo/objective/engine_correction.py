"""Correcting for an engine that samples from other probabilities than the trainer computes, at equal weights.

With rho = proximal / behavior of a token, and its product over a response:

    tis        min(rho, cap)                         truncated importance sampling
    masked_is  rho where rho <= cap, else 0          what is off by more counts nothing
    icepop     rho where low <= rho <= high, else 0  of tokens (arXiv 2510.18855)

The first two of tokens or of whole responses ("When Speed Kills Stability", Liu, Li et al. 2025). The result multiplies
each token's coefficient, or W where a kernel is a function of W (docs/objectives.md).
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.config.objective import EngineCorrection, IcePopCorrection, NoCorrection, TruncatedCorrection
from megatron_vespo.objective.importance import log_ratio, require_finite
from megatron_vespo.objective.packed import Packed, over_group


def engine_log_weights(
    correction: EngineCorrection,
    proximal_log_probs: Tensor,
    behavior_log_probs: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Log of the correction of each token: [t] float32 (float64 if the inputs are), 0 outside responses, -inf where a
    token, or its whole response, is masked. With `level: sequence` each response token holds its response's value.

    Raises:
        NotFiniteError: a response token's log-prob is not finite; names its sequence.
    """
    packed = Packed(response_mask, cu_seqlens)
    differences = log_ratio(proximal_log_probs, behavior_log_probs, packed)
    totals = over_group(packed.sum(differences), group)
    require_finite(totals, packed, proximal_log_probs=proximal_log_probs, behavior_log_probs=behavior_log_probs)
    if isinstance(correction, NoCorrection):
        corrected = torch.zeros_like(differences)
    elif isinstance(correction, IcePopCorrection):
        corrected = _masked(differences, correction.low, correction.high)
    else:
        values = packed.spread(totals) if correction.level == "sequence" else differences
        if isinstance(correction, TruncatedCorrection):
            corrected = values.clamp(max=math.log(correction.cap))
        else:
            corrected = _masked(values, 0.0, correction.cap)
    return packed.zero_outside_(corrected.to(differences.dtype))


def _masked(log_ratios: Tensor, low: float, high: float) -> Tensor:
    ratios = log_ratios.exp()
    kept = (ratios >= low) & (ratios <= high)
    return torch.where(kept, log_ratios, -torch.inf)
