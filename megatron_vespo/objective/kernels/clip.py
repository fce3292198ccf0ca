"""Clipped token ratios: PPO (arXiv 1707.06347), GRPO (2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476).

    maximise min(r A, clip(r, 1 - low, 1 + high) A),  r = pi(token) / mu(token)

The gradient is r A grad log pi where the first term is the smaller one, and 0 where the clip holds it. With a dual clip
(arXiv 1912.09729) the value is at least c A where A < 0, and the gradient 0 below that.

The methods differ in what is around this: DAPO's higher bound, Dr. GRPO's plain mean as baseline and its constant
length, GRPO's mean over each response. Those are settings of their own.
"""

import math

import torch
from torch import Tensor

from megatron_vespo.config.objective import ClipSettings
from megatron_vespo.objective.importance import ratio
from megatron_vespo.objective.kernels.inputs import Coefficients, KernelInputs


def clip(inputs: KernelInputs, config: ClipSettings) -> Coefficients:
    r, advantages = ratio(inputs.log_ratio), inputs.token_advantages()
    clipped, surrogate = clipped_surrogate(r, advantages, config.clip_low, config.clip_high)
    if config.dual_clip is not None:
        floored = (advantages < 0) & (r > config.dual_clip)
        surrogate = torch.where(floored, config.dual_clip * advantages, surrogate)
        clipped = clipped | floored
    return Coefficients(torch.where(clipped, 0.0, r), surrogate, clipped, of_tokens=True)


def clipped_surrogate(r: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Where the clip takes the gradient away, and min(r A, clip(r, 1 - low, 1 + high) A). Of one shape."""
    inside = r.clamp(1.0 - low, 1.0 + high)
    free, held = r * advantages, inside * advantages
    return held < free, torch.minimum(free, held)


def largest(config: ClipSettings) -> tuple[float, float]:
    """A ratio of a token with A < 0 has no upper bound but the dual clip's."""
    return 1.0 + config.clip_high, math.inf if config.dual_clip is None else config.dual_clip
