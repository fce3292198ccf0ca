"""From a kernel's coefficients to a value and a gradient, and to what is told of them.

Kernels that depend on nothing finer than a sequence's weight and advantage are handled as one number for each sequence:
with long responses that saves most of the work of a loss.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.objective.importance import ratio
from megatron_vespo.objective.kernels import Coefficients, KernelInputs
from megatron_vespo.objective.metrics import LossMetrics, sign_sums
from megatron_vespo.objective.packed import over_group


@dataclass(frozen=True)
class Surrogate:
    """This rank's part of a loss before it is divided.

    Attributes:
        value: scalar.
        slope: [t] its derivative by log_probs, 0 outside responses.
    """

    value: Tensor
    slope: Tensor


def surrogate_of(
    inputs: KernelInputs,
    kernel: Coefficients,
    engine_log_weights: Tensor | None,
    log_probs: Tensor,
    weights: Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[Surrogate, LossMetrics]:
    """Minus the kernel's objective.

    Args:
        engine_log_weights: [t], 0 outside responses.
        log_probs: [t] float32 or float64, detached; anything outside responses.
        weights: [s] of each token of a sequence (`aggregation.sequence_weights`).
    """
    if engine_log_weights is not None and not kernel.corrected:
        kernel = _times(kernel, inputs, ratio(engine_log_weights))
    if kernel.of_tokens or inputs.per_token_advantages:
        return _of_tokens(inputs, kernel, log_probs, weights, group)
    return _of_sequences(inputs, kernel, log_probs, weights)


def _times(kernel: Coefficients, inputs: KernelInputs, factor: Tensor) -> Coefficients:
    """With each token's coefficient and value multiplied by its `factor` [t]."""

    def spread(values: Tensor) -> Tensor:
        whole = not kernel.of_tokens and not inputs.per_token_advantages
        return inputs.packed.spread(values) if whole else values

    return replace(
        kernel,
        phi=spread(kernel.phi) * factor,
        surrogate=None if kernel.surrogate is None else spread(kernel.surrogate) * factor,
        clipped=None if kernel.clipped is None else spread(kernel.clipped),
        of_tokens=True,
    )


def _of_sequences(
    inputs: KernelInputs, kernel: Coefficients, log_probs: Tensor, weights: Tensor
) -> tuple[Surrogate, LossMetrics]:
    pull = kernel.phi * inputs.advantages
    slope = inputs.packed.zero_outside_(inputs.packed.spread((-pull * weights).to(log_probs.dtype)))
    log_probs = inputs.packed.responses(log_probs, log_probs.dtype)
    sums = sign_sums(inputs.advantages, kernel.clipped, inputs.local_lengths) | {"log_prob": log_probs.sum().double()}
    if kernel.surrogate is None:
        value = log_probs.mul_(slope).sum()
    else:
        value = -(kernel.surrogate * inputs.local_lengths * weights).sum()
    told = _told(inputs, kernel.phi, pull.abs() * inputs.lengths, inputs.advantages)
    return Surrogate(value, slope), LossMetrics(sums, told)


def _of_tokens(
    inputs: KernelInputs, kernel: Coefficients, log_probs: Tensor, weights: Tensor, group: dist.ProcessGroup | None
) -> tuple[Surrogate, LossMetrics]:
    packed, dtype = inputs.packed, log_probs.dtype
    log_probs = packed.responses(log_probs, dtype)
    advantages = inputs.token_advantages()
    phi = packed.responses(kernel.phi, dtype)
    pull = phi * advantages
    gain = log_probs * pull if kernel.surrogate is None else packed.responses(kernel.surrogate, dtype)
    each = packed.spread(weights.to(dtype))
    totals = over_group(torch.stack([packed.sum(column) for column in (phi, pull.abs(), advantages)]), group)
    tokens = inputs.lengths.clamp(min=1)
    told = _told(inputs, totals[0] / tokens, totals[1], totals[2] / tokens)
    signs = sign_sums(advantages, kernel.clipped, packed.response_mask) | {"log_prob": log_probs.sum().double()}
    return Surrogate(-(gain * each).sum(), -pull * each), LossMetrics(signs, told)


def _told(inputs: KernelInputs, phi: Tensor, moved: Tensor, advantage: Tensor) -> dict[str, Tensor]:
    """`LossMetrics.sequences`. phi and the advantage of a sequence are means over its tokens."""
    columns = torch.stack([inputs.log_weight, phi, advantage, inputs.lengths, moved]).float()
    return dict(zip(("log_weight", "phi", "advantage", "tokens", "abs_phi_advantage"), columns, strict=True))
