"""The learning algorithm: steps, staleness, advantages, objective."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_vespo.config.section import Section


class KernelCoefficients(Section):
    """phi(W) = W^c1 exp(c2 (1 - W)); largest at W = c1/c2."""

    c1: PositiveFloat
    c2: PositiveFloat


class ObjectiveConfig(Section):
    kernel: Literal["vespo"] = "vespo"
    """The coefficient of each trajectory's gradient as a function of its importance weight."""
    positive: KernelCoefficients = KernelCoefficients(c1=2.0, c2=3.0)
    """VESPO's coefficients for advantages >= 0 (published values)."""
    negative: KernelCoefficients = KernelCoefficients(c1=3.0, c2=2.0)
    """VESPO's coefficients for advantages < 0 (published values)."""
    aggregation: Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"] = "token_mean"
    """What the sum over tokens is divided by. Denominators count the whole step, over ranks and micro-batches."""


class AdvantageConfig(Section):
    estimator: Literal["group_normalised"] = "group_normalised"
    """(reward - mean of the group) / (standard deviation of the group + std_epsilon)."""
    std_ddof: Literal[0, 1] = 1
    """1: the group's standard deviation divides by G - 1, as in the published code; 0: by G."""
    std_epsilon: PositiveFloat = 1e-6


class AlgorithmConfig(Section):
    steps: PositiveInt
    """Optimizer steps of the run."""
    staleness: PositiveInt = 4
    """N: a rollout batch is N mini-batches with an optimizer step each, so tokens are at most N - 1 steps old."""
    prompts_per_step: PositiveInt
    """Prompts (groups) of one mini-batch."""
    prompts_per_rollout_batch: PositiveInt | None = None
    """Only a check: if given, it must be staleness * prompts_per_step."""
    old_policy: Literal["behavior"] = "behavior"
    """Whose log-probs importance weights are taken against: the engine's when it sampled."""
    advantage: AdvantageConfig = AdvantageConfig()
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)

    @property
    def rollout_batch_prompts(self) -> int:
        return self.staleness * self.prompts_per_step

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if self.steps % self.staleness:
            nearest = -(-self.steps // self.staleness) * self.staleness
            yield (
                "steps",
                f"{self.steps} is not a multiple of staleness ({self.staleness}): each rollout batch is "
                f"{self.staleness} steps. Use steps={nearest}",
            )
        stated = self.prompts_per_rollout_batch
        if stated is not None and stated != self.rollout_batch_prompts:
            yield (
                "prompts_per_rollout_batch",
                f"{stated} is not staleness * prompts_per_step ({self.staleness} * {self.prompts_per_step} = "
                f"{self.rollout_batch_prompts}); leave it out to derive it",
            )
