"""The policy-gradient loss of a packed batch: kernel coefficient x advantage x log-prob, aggregated."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.config import KLConfig, ObjectiveConfig
from megatron_vespo.objective import importance
from megatron_vespo.objective.aggregation import local_count, sequence_weights
from megatron_vespo.objective.kernels import KernelInputs, coefficients
from megatron_vespo.objective.kl import divergence
from megatron_vespo.objective.metrics import LossMetrics, engine_sums, measured
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
    evaluated = evaluate(
        config,
        LossInputs(
            log_probs,
            old_log_probs,
            advantages,
            Packed(response_mask, cu_seqlens),
            denominator,
            engine_log_weights,
            kl_reference_log_probs,
            entropy,
            context_parallel_group,
        ),
    )
    return evaluated.loss, evaluated.metrics()


@dataclass(frozen=True)
class LossInputs:
    """As in `policy_loss`."""

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    packed: Packed
    denominator: Tensor | int | None = None
    engine_log_weights: Tensor | None = None
    kl_reference_log_probs: Tensor | None = None
    entropy: Tensor | None = None
    context_parallel_group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Evaluated:
    """A loss, and what its metrics are made of."""

    loss: Tensor
    old_log_probs: Tensor
    inputs: KernelInputs
    surrogate: Surrogate
    engine: Tensor | None
    """[t] log-weights, 0 outside responses."""
    kl_difference: Tensor | None
    """[t] log(policy / reference), 0 outside responses."""
    entropy: Tensor | None
    """The sum over response tokens."""
    group: dist.ProcessGroup | None

    def metrics(self) -> LossMetrics:
        """Under context parallelism all ranks of the group call this."""
        metrics = measured(self.inputs, self.surrogate, self.old_log_probs, self.group)
        if self.engine is not None:
            metrics.sums |= engine_sums(self.engine, self.inputs.packed)
        if self.kl_difference is not None:
            for name in ("k1", "k3"):
                metrics.sums[f"kl_{name}"] = divergence(name, self.kl_difference)[0].sum().double()
        if self.entropy is not None:
            metrics.sums["entropy"] = self.entropy.double()
        return metrics


def evaluate(config: ObjectiveConfig, batch: LossInputs) -> Evaluated:
    """The loss alone: what a step needs to learn. Raises as `policy_loss`."""
    packed, dtype, group = batch.packed, importance.wide_enough(batch.log_probs), batch.context_parallel_group
    engine = None if batch.engine_log_weights is None else packed.responses(batch.engine_log_weights, dtype)
    inputs = _kernel_inputs(config, batch, engine)
    weights = sequence_weights(config, inputs)
    kernel = coefficients(config.kernel, inputs)
    surrogate = surrogate_of(inputs, kernel, engine, batch.log_probs.detach().to(dtype), weights)
    value, slope = surrogate.value, surrogate.slope

    difference = None
    if batch.kl_reference_log_probs is not None:
        difference = importance.log_ratio(batch.log_probs, batch.kl_reference_log_probs, packed)
    if config.kl.coefficient > 0 and config.kl.place == "loss":
        if difference is None:
            raise ValueError("objective.kl.coefficient is set, and kl_reference_log_probs is missing")
        penalty, its_slope = _penalty(config.kl, difference, packed, weights)
        value, slope = value + penalty, slope + its_slope
    loss = _Given.apply(batch.log_probs.to(dtype), value.to(dtype), slope.to(dtype))

    entropy = None
    if batch.entropy is not None:
        kept = torch.where(packed.response_mask, batch.entropy.to(dtype), 0.0)
        entropy = kept.detach().sum()
        if config.entropy_coefficient > 0:
            each = 1.0 if weights is None else packed.spread(weights.to(dtype))
            loss = loss - config.entropy_coefficient * (kept * each).sum()
    elif config.entropy_coefficient > 0:
        raise ValueError("objective.entropy_coefficient is set, and entropy is missing")
    denominator = batch.denominator
    if denominator is None:
        denominator = local_count(config.aggregation, packed.response_mask, packed.cu_seqlens, group).clamp(min=1)
    return Evaluated(loss / denominator, batch.old_log_probs, inputs, surrogate, engine, difference, entropy, group)


def _kernel_inputs(config: ObjectiveConfig, batch: LossInputs, engine: Tensor | None) -> KernelInputs:
    """What the kernel sees. `engine`: log-weights [t], 0 outside responses."""
    packed, group = batch.packed, batch.context_parallel_group
    log_ratio = importance.log_ratio(batch.log_probs, batch.old_log_probs, packed)
    log_weight, shared_lengths = packed.sum(log_ratio), None
    if group is not None:
        log_weight, shared_lengths = over_group(torch.stack([log_weight, packed.lengths]), group)
    importance.require_finite(log_weight, packed, log_probs=batch.log_probs, old_log_probs=batch.old_log_probs)
    sequences, tokens, given = len(packed.positions), len(log_ratio), len(batch.advantages)
    if given not in (sequences, tokens):
        raise ValueError(f"{given} advantages for {sequences} sequences of {tokens} tokens in all")
    if given == sequences:
        advantages = batch.advantages.detach().double()
    else:
        advantages = packed.responses(batch.advantages, log_ratio.dtype)
    inputs = KernelInputs(packed, log_ratio, log_weight, log_weight, advantages, given != sequences, shared_lengths)
    if engine is None:
        return inputs
    correction = over_group(packed.sum(engine), group)
    if config.engine_correction.level == "sequence":
        # that of a whole response stands on every token of it, and counts once
        correction = correction / inputs.lengths.clamp(min=1)
    return replace(inputs, corrected_log_weight=log_weight + correction)


def _penalty(config: KLConfig, difference: Tensor, packed: Packed, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss's KL term, and its derivative by log_probs [t]. `difference`: [t] log(policy / reference)."""
    each = torch.ones_like(difference) if weights is None else packed.spread(weights.to(difference.dtype))
    each = config.coefficient * packed.zero_outside_(each)
    estimate, derivative = divergence(config.estimator, difference)
    return (estimate * each).sum(), derivative * each


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
