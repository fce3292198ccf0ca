"""SAPO (arXiv 2511.20347): a sigmoid gate on the token's ratio in place of the clip.

    maximise f(r) A,  f(r) = sigmoid(tau (r - 1)) 4 / tau,  gradient f'(r) r A grad log pi = 4 p (1 - p) r A grad log pi

with p = sigmoid(tau (r - 1)), and tau of its own for each sign of A. At r = 1 the coefficient is 1.
"""

import torch
from torch.nn.functional import logsigmoid

from megatron_vespo.config.objective import SAPOKernel
from megatron_vespo.objective.importance import ratio
from megatron_vespo.objective.kernels.inputs import Coefficients, KernelInputs


def sapo(inputs: KernelInputs, config: SAPOKernel) -> Coefficients:
    advantages = inputs.token_advantages()
    tau = torch.full_like(advantages, config.tau_negative).masked_fill_(advantages > 0, config.tau_positive)
    gate = tau * (ratio(inputs.log_ratio) - 1.0)
    phi = 4.0 * torch.exp(logsigmoid(gate) + logsigmoid(-gate) + inputs.log_ratio)
    return Coefficients(phi, torch.sigmoid(gate) * 4.0 / tau * advantages, of_tokens=True)


def largest(config: SAPOKernel) -> tuple[float, float]:
    return _peak(config.tau_positive), _peak(config.tau_negative)


def _peak(tau: float) -> float:
    """By search: the maximum of 4 p (1 - p) r has no closed form. It lies between r = 1 and 1 + 3 / tau."""
    r = torch.linspace(1.0, 1.0 + 3.0 / tau, 100_001, dtype=torch.float64)
    p = torch.sigmoid(tau * (r - 1.0))
    return float((4.0 * p * (1.0 - p) * r).max())
