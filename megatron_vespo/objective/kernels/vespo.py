"""VESPO: a closed form of the true sequence weight (arXiv 2602.10693).

    phi(W) = W^c1 exp(c2 (1 - W)),  phi(1) = 1,  largest at W = c1 / c2, falling to 0 on both sides

phi is a coefficient of the gradient and carries none itself. The published values are (c1, c2) = (2, 3) for
advantages >= 0 and (3, 2) below: a good response keeps its weight where it has become less likely, a bad one where it
has become more likely.
"""

import math

import torch
from torch import Tensor

from megatron_vespo.config.objective import KernelCoefficients, VespoKernel
from megatron_vespo.objective.kernels.inputs import Coefficients, KernelInputs


def log_phi(log_weight: Tensor, c1: float, c2: float) -> Tensor:
    """log phi of log W, elementwise; -inf where W is 0 or too large to hold."""
    return c1 * log_weight + c2 * (1.0 - torch.exp(log_weight))


def vespo(inputs: KernelInputs, config: VespoKernel) -> Coefficients:
    log_weight = inputs.corrected_log_weight
    if config.length_normalisation != "none":
        lengths = inputs.lengths.clamp(min=1)
        log_weight = log_weight / (lengths if config.length_normalisation == "length" else lengths.sqrt())
    positive, negative = (
        inputs.like_advantages(torch.exp(log_phi(log_weight, side.c1, side.c2)))
        for side in (config.positive, config.negative)
    )
    return Coefficients(torch.where(inputs.advantages >= 0, positive, negative), corrected=True)


def largest(config: VespoKernel) -> tuple[float, float]:
    return _peak(config.positive), _peak(config.negative)


def _peak(side: KernelCoefficients) -> float:
    return math.exp(side.c1 * math.log(side.c1 / side.c2) + side.c2 - side.c1)
