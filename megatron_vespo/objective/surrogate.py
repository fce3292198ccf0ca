"""From a kernel's coefficients to a value and a gradient.

Kernels that depend on nothing finer than a sequence's weight and advantage are handled as one number for each sequence:
with long responses that saves most of the work of a loss.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from megatron_vespo.objective.importance import ratio
from megatron_vespo.objective.kernels import Coefficients, KernelInputs


@dataclass(frozen=True)
class Surrogate:
    """Minus a kernel's objective on this rank, before it is divided.

    Attributes:
        value: scalar.
        slope: [t] its derivative by log_probs, 0 outside responses.
        phi: [s], or [t] if `of_tokens` (0 outside responses).
        pull: phi A, of the same shape.
        clipped: the same, or None.
        of_tokens: whether phi differs within a sequence.
    """

    value: Tensor
    slope: Tensor
    phi: Tensor
    pull: Tensor
    clipped: Tensor | None
    of_tokens: bool


def surrogate_of(
    inputs: KernelInputs,
    kernel: Coefficients,
    engine_log_weights: Tensor | None,
    log_probs: Tensor,
    weights: Tensor | None,
) -> Surrogate:
    """
    Args:
        engine_log_weights: [t], 0 outside responses.
        log_probs: [t] float32 or float64, detached; anything outside responses.
        weights: [s] of each token of a sequence (`aggregation.sequence_weights`); None: 1.
    """
    if engine_log_weights is not None and not kernel.corrected:
        kernel = _times(kernel, inputs, ratio(engine_log_weights))
    if kernel.of_tokens or inputs.per_token_advantages:
        return _of_tokens(inputs, kernel, log_probs, weights)
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


def _of_sequences(inputs: KernelInputs, kernel: Coefficients, log_probs: Tensor, weights: Tensor | None) -> Surrogate:
    packed, pull = inputs.packed, kernel.phi * inputs.advantages
    each = pull if weights is None else pull * weights
    slope = packed.zero_outside_(packed.spread(each.neg().to(log_probs.dtype)))
    log_probs = packed.responses(log_probs, log_probs.dtype)
    if kernel.surrogate is None:
        value = log_probs.mul_(slope).sum()
    else:
        gain = kernel.surrogate * packed.lengths
        value = -(gain if weights is None else gain * weights).sum()
    return Surrogate(value, slope, kernel.phi, pull, kernel.clipped, False)


def _of_tokens(inputs: KernelInputs, kernel: Coefficients, log_probs: Tensor, weights: Tensor | None) -> Surrogate:
    packed, dtype = inputs.packed, log_probs.dtype
    log_probs = packed.responses(log_probs, dtype)
    phi = packed.responses(kernel.phi, dtype)
    pull = phi * inputs.token_advantages()
    gain = log_probs * pull if kernel.surrogate is None else packed.responses(kernel.surrogate, dtype)
    slope = -pull
    if weights is not None:
        each = packed.spread(weights.to(dtype))
        gain, slope = gain * each, slope * each
    return Surrogate(-gain.sum(), slope, phi, pull, kernel.clipped, True)
