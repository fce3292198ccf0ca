"""The importance weight of the whole response itself as coefficient: in full, truncated, or tapered.

Full: W, unbiased. Truncated: min(W, cap), as in V-trace and IMPALA (arXiv 1802.01561), of a whole response.
TOPR (arXiv 2503.14286): 1 for advantages >= 0, so what is good is imitated however unlikely it became; min(W, 1) below,
so what is bad is left alone once it has become unlikely.
"""

import math

import torch

from megatron_vespo.config.objective import ImportanceKernel, TOPRKernel, TruncatedImportanceKernel
from megatron_vespo.objective.importance import ratio
from megatron_vespo.objective.kernels.inputs import Coefficients, KernelInputs


def importance(inputs: KernelInputs, config: ImportanceKernel) -> Coefficients:
    return Coefficients(inputs.like_advantages(ratio(inputs.corrected_log_weight)), corrected=True)


def truncated_importance(inputs: KernelInputs, config: TruncatedImportanceKernel) -> Coefficients:
    weight = inputs.like_advantages(ratio(inputs.corrected_log_weight))
    return Coefficients(weight.clamp(max=config.cap), clipped=weight > config.cap, corrected=True)


def topr(inputs: KernelInputs, config: TOPRKernel) -> Coefficients:
    weight = inputs.like_advantages(ratio(inputs.corrected_log_weight))
    bad = inputs.advantages < 0
    phi = torch.where(bad, weight.clamp(max=1.0), 1.0)
    return Coefficients(phi, clipped=bad & (weight > 1.0), corrected=True)


def largest_importance(config: ImportanceKernel) -> tuple[float, float]:
    return math.inf, math.inf


def largest_truncated(config: TruncatedImportanceKernel) -> tuple[float, float]:
    return config.cap, config.cap


def largest_topr(config: TOPRKernel) -> tuple[float, float]:
    return 1.0, 1.0
