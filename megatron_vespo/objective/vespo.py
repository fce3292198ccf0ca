"""VESPO's kernel: a closed form of the true sequence weight (arXiv 2602.10693).

    phi(W) = W^c1 exp(c2 (1 - W)),  phi(1) = 1,  largest at W = c1 / c2, falling to 0 on both sides

phi is a coefficient of the gradient and carries none itself. The published values are (c1, c2) = (2, 3) for
advantages >= 0 and (3, 2) below: a good response keeps its weight where it has become less likely, a bad one where it
has become more likely.
"""

import torch
from torch import Tensor

from megatron_vespo.config import ObjectiveConfig


def log_phi(log_weight: Tensor, c1: Tensor | float, c2: Tensor | float) -> Tensor:
    """log phi of log W, elementwise; -inf where W is too large to hold."""
    return c1 * log_weight + c2 * (1.0 - torch.exp(log_weight))


def vespo_coefficients(log_weight: Tensor, advantages: Tensor, config: ObjectiveConfig) -> Tensor:
    """phi of each sequence: [s], [s] -> [s], in log_weight's dtype."""
    good = advantages >= 0
    c1 = torch.where(good, config.positive.c1, config.negative.c1).to(log_weight.dtype)
    c2 = torch.where(good, config.positive.c2, config.negative.c2).to(log_weight.dtype)
    return torch.exp(log_phi(log_weight, c1, c2))
