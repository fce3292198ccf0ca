"""VESPO whose log W is held to a band before phi: no response's coefficient falls to 0. For long_sums.yaml."""

import torch

from megatron_vespo.objective.kernels import Coefficients, KernelInputs
from megatron_vespo.objective.kernels.vespo import log_phi


def held(inputs: KernelInputs, options: dict[str, float]) -> Coefficients:
    """The published coefficients of phi(W), at log W no lower than `low` and no higher than `high`."""
    log_weight = inputs.corrected_log_weight.clamp(options["low"], options["high"])
    positive, negative = (inputs.like_advantages(torch.exp(log_phi(log_weight, *c))) for c in ((2.0, 3.0), (3.0, 2.0)))
    return Coefficients(torch.where(inputs.advantages >= 0, positive, negative), corrected=True)
