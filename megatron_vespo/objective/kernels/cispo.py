"""CISPO (arXiv 2506.13585, equations 4 and 5): the token's ratio, clipped, as a constant weight of log pi.

    maximise sg(clip(r, ratio_min, ratio_max)) A log pi

Unlike PPO's clip it takes no token's gradient away.
"""

from megatron_vespo.config.objective import CISPOKernel
from megatron_vespo.objective.importance import ratio
from megatron_vespo.objective.kernels.inputs import Coefficients, KernelInputs


def cispo(inputs: KernelInputs, config: CISPOKernel) -> Coefficients:
    r = ratio(inputs.log_ratio)
    phi = r.clamp(config.ratio_min, config.ratio_max)
    return Coefficients(phi, clipped=phi != r, of_tokens=True)


def largest(config: CISPOKernel) -> tuple[float, float]:
    return config.ratio_max, config.ratio_max
