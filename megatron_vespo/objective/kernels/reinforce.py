"""REINFORCE as if the data were on-policy: coefficient 1."""

import torch

from megatron_vespo.config.objective import ReinforceKernel
from megatron_vespo.objective.kernels.inputs import Coefficients, KernelInputs


def reinforce(inputs: KernelInputs, config: ReinforceKernel) -> Coefficients:
    return Coefficients(torch.ones_like(inputs.advantages))


def largest(config: ReinforceKernel) -> tuple[float, float]:
    return 1.0, 1.0
