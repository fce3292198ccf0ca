"""The policy-gradient loss of a packed batch: kernel coefficient x advantage x log-prob, aggregated."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.config import KLConfig, ObjectiveConfig
from megatron_vespo.objective import importance
from megatron_vespo.objective.aggregation import count_of, sequence_weights
from megatron_vespo.objective.kernels import KernelInputs, coefficients
from megatron_vespo.objective.kl import divergence
from megatron_vespo.objective.metrics import LossMetrics, divergence_sums_, engine_sums, size_sums
from megatron_vespo.objective.packed import Packed, over_group
from megatron_vespo.objective.surrogate import Surrogate, surrogate_of


def policy_loss(
    config: ObjectiveConfig,
    *,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    denominator: Tensor | int | None = None,
    engine_log_weights: Tensor | None = None,
    kl_reference_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    context_parallel_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, LossMetrics]:
    """Loss whose value is that of the kernel's published objective and whose gradient is -E[phi A grad log pi].

    Args:
        log_probs: [t] current policy, of each position's label. With `entropy`, the only input with a gradient.
        old_log_probs: [t] the old policy (mu); anything where `response_mask` is False.
        advantages: [s] one for each packed sequence, or [t] one for each token.
        response_mask: [t] bool, True on labels that are response tokens.
        cu_seqlens: [s + 1] int32, bounds of the sequences.
        denominator: of the whole step; None: this call's own count (`aggregation.local_count`).
        engine_log_weights: [t] (`engine_correction.engine_log_weights`): 0 where unused, -inf where masked.
        kl_reference_log_probs: [t] the frozen policy of the KL term; measured even if the coefficient is 0.
        entropy: [t] of the distribution each label was drawn from, for the bonus and as a metric.
        context_parallel_group: ranks among which the positions of each sequence are dealt out: all else that is [t]
            holds this rank's, and `cu_seqlens` bounds them. All ranks of the group call this together, and the loss of
            the sequences is the sum of theirs.

    Returns:
        A scalar (float32; float64 if `log_probs` is), and metrics that add up over ranks and micro-batches.

    Raises:
        NotFiniteError: a log-prob of a response token is not finite; names its sequence.
        ValueError: an input that the configuration needs is missing.
    """
    group = context_parallel_group
    dtype = importance.wide_enough(log_probs)
    packed = Packed(response_mask, cu_seqlens)
    engine = None if engine_log_weights is None else packed.responses(engine_log_weights, dtype)
    inputs, sums = _kernel_inputs(config, log_probs, old_log_probs, advantages, packed, engine, group)
    weights = sequence_weights(config, inputs.lengths)
    surrogate, metrics = surrogate_of(
        inputs, coefficients(config.kernel, inputs), engine, log_probs.detach().to(dtype), weights, group
    )
    metrics.sums |= sums
    if engine is not None:
        metrics.sums |= engine_sums(engine, packed)
    if kl_reference_log_probs is not None:
        difference = importance.log_ratio(log_probs, kl_reference_log_probs, packed)
        metrics.sums |= {f"kl_{name}": divergence(name, difference)[0].sum().double() for name in ("k1", "k3")}
        each = packed.zero_outside_(packed.spread(weights.to(difference.dtype)))
        surrogate = _with_kl(surrogate, config.kl, difference, each)
    elif config.kl.coefficient > 0 and config.kl.place == "loss":
        raise ValueError("objective.kl.coefficient is set, and kl_reference_log_probs is missing")

    numerator = _Given.apply(log_probs.to(dtype), surrogate.value.to(dtype), surrogate.slope.to(dtype))
    if entropy is not None:
        kept = torch.where(response_mask, entropy.to(dtype), 0.0)
        metrics.sums["entropy"] = kept.detach().sum().double()
        numerator = numerator - config.entropy_coefficient * (kept * packed.spread(weights.to(dtype))).sum()
    elif config.entropy_coefficient > 0:
        raise ValueError("objective.entropy_coefficient is set, and entropy is missing")
    if denominator is None:
        denominator = count_of(config.aggregation, inputs.local_lengths, inputs.lengths, group).clamp(min=1)
    return numerator / denominator, metrics


def _kernel_inputs(
    config: ObjectiveConfig,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    packed: Packed,
    engine: Tensor | None,
    group: dist.ProcessGroup | None,
) -> tuple[KernelInputs, dict[str, Tensor]]:
    """What the kernel sees, and sums over tokens of how far the policies differ. `engine`: 0 outside responses."""
    log_ratio = importance.log_ratio(log_probs, old_log_probs, packed)
    local_lengths = packed.count()
    sums = {"tokens": local_lengths.sum().long()} | size_sums(log_ratio)
    wide = log_ratio.to(torch.float64, copy=True)
    columns = [packed.sum(wide), local_lengths]
    sums |= divergence_sums_(wide)
    if engine is not None:
        columns.append(packed.sum(engine))
    log_weight, lengths, *correction = over_group(torch.stack(columns), group)
    importance.require_finite(log_weight, packed, log_probs=log_probs, old_log_probs=old_log_probs)
    corrected = log_weight
    if correction:
        # that of a whole response stands on every token of it, and counts once
        whole = config.engine_correction.level == "sequence"
        corrected = log_weight + (correction[0] / lengths.clamp(min=1) if whole else correction[0])
    sequences, tokens = len(packed.positions), len(log_probs)
    if len(advantages) not in (sequences, tokens):
        raise ValueError(f"{len(advantages)} advantages for {sequences} sequences of {tokens} tokens in all")
    of_tokens = len(advantages) != sequences
    inputs = KernelInputs(
        packed=packed,
        log_ratio=log_ratio,
        log_weight=log_weight,
        corrected_log_weight=corrected,
        lengths=lengths,
        local_lengths=local_lengths,
        advantages=packed.responses(advantages, log_ratio.dtype) if of_tokens else advantages.detach().double(),
        per_token_advantages=of_tokens,
    )
    return inputs, sums


def _with_kl(surrogate: Surrogate, config: KLConfig, difference: Tensor, each: Tensor) -> Surrogate:
    """With the loss's penalty, if there is one. [t]: log(policy / reference), and the weight of each token,
    0 outside responses."""
    if config.coefficient == 0 or config.place != "loss":
        return surrogate
    estimate, derivative = divergence(config.estimator, difference)
    each = config.coefficient * each
    return Surrogate(surrogate.value + (estimate * each).sum(), surrogate.slope + derivative * each)


class _Given(torch.autograd.Function):
    """A number and its derivative by log_probs, both given: the papers' values and gradients are not each other's."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad_outputs[0] * slope, None, None


def demonstration_loss(log_probs: Tensor, response_mask: Tensor) -> tuple[Tensor, LossMetrics]:
    """Summed cross-entropy of supervised training; the denominator is the number of response tokens."""
    numerator = -torch.where(response_mask, log_probs, 0.0).sum()
    return numerator, LossMetrics(sums={"tokens": response_mask.sum()})
