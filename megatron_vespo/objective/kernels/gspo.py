"""GSPO and GSPO-token (arXiv 2507.18071): the clip of PPO on a length-normalised sequence ratio s = W^(1/T).

    maximise min(s A, clip(s, 1 - low, 1 + high) A),  gradient s A (1/T) sum_t grad log pi_t where it is not clipped

With one advantage a sequence both have the same value and gradient, so one function serves both: each token has the
sequence's value and the coefficient s, which a mean over the sequence's tokens turns into the formula above (the
paper's aggregation is sequence_mean_token_mean). GSPO-token allows an advantage for each token: s is then
sg(s) pi_t / sg(pi_t).
"""

import torch

from megatron_vespo.config.objective import GSPOKernel, GSPOTokenKernel, SequenceClipSettings
from megatron_vespo.objective.importance import ratio
from megatron_vespo.objective.kernels.clip import clipped_surrogate
from megatron_vespo.objective.kernels.inputs import Coefficients, KernelInputs


def gspo(inputs: KernelInputs, config: GSPOKernel | GSPOTokenKernel) -> Coefficients:
    if inputs.per_token_advantages and isinstance(config, GSPOKernel):
        raise ValueError("gspo has one advantage for each sequence; for an advantage of each token take gspo_token")
    s = inputs.like_advantages(ratio(inputs.log_weight / inputs.lengths.clamp(min=1)))
    clipped, surrogate = clipped_surrogate(s, inputs.advantages, config.clip_low, config.clip_high)
    return Coefficients(torch.where(clipped, 0.0, s), surrogate, clipped)


def largest(config: SequenceClipSettings) -> tuple[float, float]:
    return 1.0 + config.clip_high, float("inf")
