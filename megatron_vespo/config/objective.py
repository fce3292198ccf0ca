"""What is optimised: the kernel, how tokens are aggregated, corrections, KL and entropy. Formulas: docs/objectives.md."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from megatron_vespo.config.section import Section

Aggregation = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length"]
Level = Literal["token", "sequence"]
ClipLow = Annotated[float, Field(gt=0, le=1)]


class KernelCoefficients(Section):
    """phi(W) = W^c1 exp(c2 (1 - W)); largest at W = c1/c2."""

    c1: PositiveFloat
    """Power of W. The maximum is at W = c1 / c2."""
    c2: PositiveFloat
    """Rate of the exponential decay."""


class VespoKernel(Section):
    """A smooth function of the whole response's weight (arXiv 2602.10693). Equal coefficients make it symmetric."""

    name: Literal["vespo"] = "vespo"
    positive: KernelCoefficients = KernelCoefficients(c1=2.0, c2=3.0)
    """For advantages >= 0."""
    negative: KernelCoefficients = KernelCoefficients(c1=3.0, c2=2.0)
    """For advantages < 0."""
    length_normalisation: Literal["none", "length", "sqrt_length"] = "none"
    """Ablations of the paper: phi of W^(1/T) or W^(1/sqrt T) for T response tokens. The method is `none`."""


class ReinforceKernel(Section):
    """Coefficient 1: no correction at all."""

    name: Literal["reinforce"]


class ImportanceKernel(Section):
    """Coefficient W: full importance sampling, unbiased and of unbounded variance."""

    name: Literal["importance"]


class TruncatedImportanceKernel(Section):
    """Coefficient min(W, cap): truncated importance sampling of whole responses."""

    name: Literal["truncated_importance"]
    cap: PositiveFloat = 2.0


class ClipSettings(Section):
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) for the token's ratio r."""

    clip_low: ClipLow = 0.2
    """A token's ratio counts down to 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """And up to 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """c > 1: where A < 0, the surrogate is at least c A, so a ratio above c has no gradient (arXiv 1912.09729, c = 3)."""


class PPOKernel(ClipSettings):
    """Clipped token ratios (arXiv 1707.06347)."""

    name: Literal["ppo"]


class GRPOKernel(ClipSettings):
    """PPO's clip, with advantages of a group (arXiv 2402.03300)."""

    name: Literal["grpo"]


class DrGRPOKernel(ClipSettings):
    """PPO's clip; the method is its advantage and its aggregation, which are checked (arXiv 2503.20783)."""

    name: Literal["dr_grpo"]


class DAPOKernel(ClipSettings):
    """PPO's clip with a higher upper bound (arXiv 2503.14476)."""

    name: Literal["dapo"]
    clip_high: PositiveFloat = 0.28


class SequenceClipSettings(Section):
    """min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) for s = W^(1/T)."""

    clip_low: ClipLow = 3e-4
    """W^(1/T) counts down to 1 - clip_low."""
    clip_high: PositiveFloat = 4e-4
    """And up to 1 + clip_high."""


class GSPOKernel(SequenceClipSettings):
    """Clipped length-normalised sequence ratio (arXiv 2507.18071)."""

    name: Literal["gspo"]


class GSPOTokenKernel(SequenceClipSettings):
    """GSPO that takes an advantage for each token (arXiv 2507.18071, section 4.3)."""

    name: Literal["gspo_token"]


class SAPOKernel(Section):
    """A soft gate in place of the clip: sigmoid(tau (r - 1)) 4 / tau (arXiv 2511.20347)."""

    name: Literal["sapo"]
    tau_positive: PositiveFloat = 1.0
    """For advantages > 0."""
    tau_negative: PositiveFloat = 1.05
    """For other advantages."""


class CISPOKernel(Section):
    """The token's ratio, clipped, as a weight: no token loses its gradient (arXiv 2506.13585)."""

    name: Literal["cispo"]
    ratio_min: NonNegativeFloat = 0.0
    """The paper sets no lower bound."""
    ratio_max: PositiveFloat = 5.0
    """1 + epsilon_high. The paper does not publish it; 5 is that of ScaleRL (arXiv 2510.13786)."""

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if self.ratio_min >= self.ratio_max:
            yield "ratio_min", f"{self.ratio_min} must be less than ratio_max ({self.ratio_max})"


class TOPRKernel(Section):
    """1 for advantages >= 0, min(W, 1) below (arXiv 2503.14286)."""

    name: Literal["topr"]


class CustomKernel(Section):
    """A function of your own: `(KernelInputs, options) -> Coefficients` (megatron_vespo.objective.kernels)."""

    name: Literal["custom"]
    function: str
    """Dotted path `package.module:function`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Given to the function as they are."""


def named(value: object) -> object:
    """`kernel: grpo` is short for `kernel: {name: grpo}`."""
    return {"name": value} if isinstance(value, str) else value


Kernel = Annotated[
    Annotated[
        VespoKernel
        | ReinforceKernel
        | ImportanceKernel
        | TruncatedImportanceKernel
        | PPOKernel
        | GRPOKernel
        | DrGRPOKernel
        | DAPOKernel
        | GSPOKernel
        | GSPOTokenKernel
        | SAPOKernel
        | CISPOKernel
        | TOPRKernel
        | CustomKernel,
        Field(discriminator="name"),
    ],
    BeforeValidator(named),
]


class NoCorrection(Section):
    name: Literal["none"] = "none"
    level: ClassVar[Level] = "token"


class TruncatedCorrection(Section):
    """min(proximal / behavior, cap), of each token or of the whole response."""

    name: Literal["tis"]
    level: Level = "token"
    """Of each token, or of the whole response."""
    cap: PositiveFloat = 2.0


class MaskedCorrection(Section):
    """proximal / behavior where it is at most cap, else 0: of each token, or of the whole response."""

    name: Literal["masked_is"]
    level: Level = "sequence"
    """Of each token, or of the whole response."""
    cap: PositiveFloat = 2.0


class IcePopCorrection(Section):
    """proximal / behavior of each token where it is within [low, high], else 0 (arXiv 2510.18855)."""

    name: Literal["icepop"]
    level: ClassVar[Level] = "token"
    low: NonNegativeFloat = 0.5
    high: PositiveFloat = 5.0

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if not self.low < 1 < self.high:
            yield "low", f"the band [{self.low}, {self.high}] must hold 1, where trainer and engine agree"


EngineCorrection = Annotated[
    Annotated[NoCorrection | TruncatedCorrection | MaskedCorrection | IcePopCorrection, Field(discriminator="name")],
    BeforeValidator(named),
]


class KLConfig(Section):
    """A penalty for leaving the frozen reference policy."""

    coefficient: NonNegativeFloat = 0.0
    """0: no penalty, and no reference model is needed."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of log(policy / reference) = d on sampled tokens: d; d^2 / 2; exp(-d) - 1 + d."""
    place: Literal["loss", "reward"] = "loss"
    """`loss`: a differentiable term on each token. `reward`: the sum over the response is taken off its reward."""

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if self.coefficient > 0 and self.place == "loss" and self.estimator == "k1":
            yield (
                "estimator",
                "the gradient of k1 in the loss is grad log pi, whose mean is 0: it holds the policy nowhere. Use k2 "
                "(gradient of KL(policy || reference)), k3 (of KL(reference || policy)), or place: reward",
            )


class ObjectiveConfig(Section):
    kernel: Kernel = VespoKernel()
    """The coefficient of each token's gradient as a function of importance weights. A name alone (`grpo`) takes that
    kernel's published settings."""
    aggregation: Aggregation = "token_mean"
    """What the sum over tokens is divided by. Denominators count the whole step, over ranks and micro-batches."""
    constant_length: PositiveInt | None = None
    """Of `aggregation: constant_length`: each response's sum over tokens is divided by it."""
    engine_correction: EngineCorrection = NoCorrection()
    """What to do about engine and trainer that disagree at equal weights. Needs `old_policy: proximal`."""
    kl: KLConfig = KLConfig()
    entropy_coefficient: NonNegativeFloat = 0.0
    """Of the entropy bonus."""

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if self.aggregation == "constant_length" and self.constant_length is None:
            yield "constant_length", "required by aggregation: constant_length (usually rollout.max_response_tokens)"
        if self.aggregation != "constant_length" and self.constant_length is not None:
            yield "constant_length", f"of no use with aggregation: {self.aggregation}; leave it out"
        if self.kernel.name == "dr_grpo" and self.aggregation != "constant_length":
            yield "aggregation", "kernel dr_grpo needs constant_length; with another aggregation name the kernel grpo"
