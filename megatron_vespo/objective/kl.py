"""Divergence from the frozen reference policy, estimated on sampled tokens (Schulman, "Approximating KL divergence").

With d = log pi - log reference of a token that pi sampled:

    k1 = d            unbiased for KL(pi || reference), either sign
    k2 = d^2 / 2      biased, small variance
    k3 = e^-d - 1 + d unbiased, never negative

As a reward (`place: reward`) they are constants, and k1 gives the gradient of KL(pi || reference). As a term of the loss
what counts is their own gradient, and that is another story (arXiv 2510.01555):

    grad k1 = grad log pi               mean 0: no penalty at all, so the configuration refuses it
    grad k2 = d grad log pi             mean is the gradient of KL(pi || reference)
    grad k3 = (1 - e^-d) grad log pi    mean is the gradient of KL(reference || pi), bounded on one side

All of that is for tokens sampled from pi; on older data it holds as far as pi is still near the policy that sampled.
"""

import torch
from torch import Tensor

from megatron_vespo.config.objective import KLConfig
from megatron_vespo.objective.importance import log_ratio, ratio
from megatron_vespo.objective.packed import Packed


def divergence(estimator: str, difference: Tensor) -> tuple[Tensor, Tensor]:
    """The estimate, and its derivative by log pi; elementwise in `difference` = log pi - log reference."""
    if estimator == "k1":
        return difference, torch.ones_like(difference)
    if estimator == "k2":
        return difference**2 / 2, difference
    if estimator == "k3":
        inverse = ratio(-difference)
        return inverse - 1.0 + difference, 1.0 - inverse
    raise ValueError(f"no KL estimator is called {estimator}")


def kl_penalty(
    config: KLConfig, log_probs: Tensor, reference_log_probs: Tensor, response_mask: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """What to take off each trajectory's reward (`place: reward`): coefficient x the sum over its response tokens.

    All [t] in, [s] float64 out. `log_probs` are those of the policy that sampled.
    """
    packed = Packed(response_mask, cu_seqlens)
    estimate, _ = divergence(config.estimator, log_ratio(log_probs, reference_log_probs, packed))
    return config.coefficient * packed.sum(estimate)
