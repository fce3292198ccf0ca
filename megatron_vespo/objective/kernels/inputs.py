"""What a kernel is given, and what it gives back. Nothing here carries a gradient."""

from dataclasses import dataclass

from torch import Tensor

from megatron_vespo.objective.packed import Packed


@dataclass(frozen=True)
class KernelInputs:
    """A packed batch: t positions, s sequences. What is [t] is float32 (float64 if the log-probs are), and 0 outside
    response tokens; what is [s] is float64. Under context parallelism [t] holds this rank's positions, [s] whole
    sequences.

    Attributes:
        packed: where the sequences lie, and what are response tokens.
        log_ratio: [t] log(current / old).
        log_weight: [s] log W: the sum of log_ratio.
        corrected_log_weight: [s] the same plus the engine's correction; -inf where that masks.
        lengths: [s] response tokens.
        advantages: [s] one for each sequence, or [t] one for each token.
        per_token_advantages: which of the two.
    """

    packed: Packed
    log_ratio: Tensor
    log_weight: Tensor
    corrected_log_weight: Tensor
    advantages: Tensor
    per_token_advantages: bool
    shared_lengths: Tensor | None = None
    """`lengths`, if other ranks hold some of them."""

    @property
    def lengths(self) -> Tensor:
        return self.packed.lengths if self.shared_lengths is None else self.shared_lengths

    def like_advantages(self, values: Tensor) -> Tensor:
        """Values of sequences in the shape of the advantages: [s] -> [s] or [t]."""
        return self.packed.spread(values) if self.per_token_advantages else values

    def token_advantages(self) -> Tensor:
        """[t], each response token's."""
        if self.per_token_advantages:
            return self.advantages
        return self.packed.zero_outside_(self.packed.spread(self.advantages.to(self.log_ratio.dtype)))


@dataclass(frozen=True)
class Coefficients:
    """How a kernel weighs gradients: that of the objective is the sum over response tokens of phi A grad log pi.

    All three tensors are [t], or in the shape of the advantages where phi depends on nothing finer than that.

    Attributes:
        phi: finite and >= 0.
        surrogate: the value that the paper maximises at each token, A included; None: phi A log pi.
        clipped: bool, where a bound took the gradient away or held it back; None: this kernel has no bound.
        of_tokens: they are [t]. False: as the advantages are.
        corrected: phi was made of `corrected_log_weight`. False: the loss multiplies it by each token's correction.
    """

    phi: Tensor
    surrogate: Tensor | None = None
    clipped: Tensor | None = None
    of_tokens: bool = False
    corrected: bool = False
