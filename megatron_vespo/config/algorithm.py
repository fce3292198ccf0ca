"""The learning algorithm: steps, staleness, rewards to advantages, objective."""

import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_vespo.config.objective import ObjectiveConfig
from megatron_vespo.config.section import Section

OldPolicy = Literal["behavior", "proximal"]


class AdvantageConfig(Section):
    estimator: Literal[
        "group_normalised",
        "group_mean",
        "rloo",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "max_rl",
        "custom",
    ] = "group_normalised"
    """From rewards to advantages; formulas in docs/objectives.md."""
    std_ddof: Literal[0, 1] = 1
    """1: standard deviations divide by n - 1, as in the published code; 0: by n."""
    std_epsilon: PositiveFloat = 1e-6
    """Added to standard deviations."""
    zero_variance_groups: Literal["keep", "filter"] = "keep"
    """Groups whose rewards are all equal, before `overlong_shaping` and a KL taken off the reward: trained on (they
    count in denominators), or left out of the step."""
    function: str | None = None
    """Of `estimator: custom`: the dotted path `package.module:function` of
    `(rewards [groups, G], config) -> advantages [groups, G]`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """For that function."""

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if self.estimator == "custom" and self.function is None:
            yield "function", "required by estimator: custom (package.module:function)"
        if self.estimator != "custom" and (self.function is not None or self.options):
            yield "estimator", f"{self.estimator} takes no function and no options; name the estimator custom"


class OverlongShaping(Section):
    """A penalty that grows over the last tokens before `rollout.max_response_tokens` (DAPO, arXiv 2503.14476)."""

    buffer_tokens: PositiveInt
    """Length of the ramp; shorter responses are not penalised."""
    penalty: PositiveFloat = 1.0
    """Taken off the reward of a response that is cut."""


class AsynchronousConfig(Section):
    """Sampling and training side by side, with a hard bound on how old what is trained on may be.

    Staleness is counted in optimizer steps, from the weights that sampled a response's first token to those that are
    trained. One dial: with `max_staleness` K - 1 the two take turns, with 2 K - 1 sampling is one batch ahead, and the
    larger it is the less they wait for each other.
    """

    sync_every: PositiveInt = 1
    """K: optimizer steps between weight updates."""
    max_staleness: int | None = Field(default=None, ge=0)
    """S, at least K - 1."""
    staleness_threshold: float | None = Field(default=None, ge=0)
    """The paper's s, instead of `max_staleness`: S = ceil((1 + s) K) - 1."""
    update: Literal["abort", "in_place", "wait"] = "abort"
    """What a weight update does to responses that are being sampled. `abort`: each keeps what it has, and goes on under
    the new weights in another request. `in_place`: it goes on over the keys and values of the old weights. `wait`: no new
    ones are started until all have ended."""

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if (self.max_staleness is None) == (self.staleness_threshold is None):
            yield "max_staleness", "name either this or staleness_threshold"
        elif self.bound < self.sync_every - 1:
            yield (
                "max_staleness",
                f"{self.bound} is less than sync_every - 1 ({self.sync_every} - 1): the last step before an update "
                "could never be taken",
            )

    mismatch_every: PositiveInt = 10
    """Compare engine and trainer at equal weights after each so-many-th update, on a few responses sampled for it."""

    @property
    def bound(self) -> int:
        """S."""
        if self.max_staleness is not None:
            return self.max_staleness
        assert self.staleness_threshold is not None
        return math.ceil((1 + self.staleness_threshold) * self.sync_every) - 1


class AlgorithmConfig(Section):
    steps: PositiveInt
    """Optimizer steps of the run."""
    staleness: PositiveInt = 4
    """N: a rollout batch is N mini-batches with an optimizer step each, so tokens are at most N - 1 steps old."""
    asynchronous: AsynchronousConfig | None = None
    """None: a batch is sampled, then trained on, in turns. Else `staleness` is not used."""
    prompts_per_step: PositiveInt
    """Prompts (groups) of one mini-batch."""
    prompts_per_rollout_batch: PositiveInt | None = None
    """Only a check: if given, it must be staleness * prompts_per_step."""
    over_sampling: float = Field(default=1.0, ge=1)
    """Synchronous, with `zero_variance_groups: filter`: so many times the prompts of a rollout batch are sampled, and the
    first groups with variance fill it, in the order of their prompts, never of their ends, which would favour short
    responses. Asynchronous runs replace groups without variance anyway."""
    old_policy: OldPolicy = "behavior"
    """Whose log-probs importance weights are taken against: the engine's when it sampled; or the trainer's at the start
    of the rollout batch, which cost a forward pass."""
    advantage: AdvantageConfig = AdvantageConfig()
    overlong_shaping: OverlongShaping | None = None
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    gradient_variance_every: int = Field(default=0, ge=0)
    """Measure the variance of the gradient at each so-many-th optimizer step, which then costs about two; 0: never."""

    @property
    def sync_every(self) -> int:
        """Optimizer steps between weight updates."""
        return self.staleness if self.asynchronous is None else self.asynchronous.sync_every

    @property
    def max_staleness(self) -> int:
        """In optimizer steps."""
        return self.staleness - 1 if self.asynchronous is None else self.asynchronous.bound

    @property
    def rollout_batch_prompts(self) -> int:
        return self.staleness * self.prompts_per_step

    def own_problems(self) -> Iterator[tuple[str, str]]:
        if self.asynchronous is not None:
            if self.prompts_per_rollout_batch is not None:
                yield "prompts_per_rollout_batch", "there are no rollout batches with asynchronous: leave it out"
        elif self.steps % self.staleness:
            nearest = -(-self.steps // self.staleness) * self.staleness
            yield (
                "steps",
                f"{self.steps} is not a multiple of staleness ({self.staleness}): each rollout batch is "
                f"{self.staleness} steps. Use steps={nearest}",
            )
        stated = self.prompts_per_rollout_batch
        if self.asynchronous is None and stated is not None and stated != self.rollout_batch_prompts:
            yield (
                "prompts_per_rollout_batch",
                f"{stated} is not staleness * prompts_per_step ({self.staleness} * {self.prompts_per_step} = "
                f"{self.rollout_batch_prompts}); leave it out to derive it",
            )
        if self.over_sampling > 1 and (
            self.asynchronous is not None or self.advantage.zero_variance_groups != "filter"
        ):
            yield (
                "over_sampling",
                f"{self.over_sampling} has nothing to choose by: it needs advantage.zero_variance_groups: filter, and no "
                "asynchronous. Leave it at 1",
            )
        if self.gradient_variance_every > 0 and self.prompts_per_step < 2:
            yield "gradient_variance_every", "needs at least 2 groups in a step (prompts_per_step)"
        yield from self._objective_problems()

    def _objective_problems(self) -> Iterator[tuple[str, str]]:
        """Settings of the objective that the rest of the algorithm makes wrong."""
        correction = self.objective.engine_correction.name
        if correction != "none" and self.old_policy == "behavior":
            yield (
                "objective.engine_correction",
                f"{correction} needs old_policy: proximal. Against behavior, the importance weight W holds what engine "
                "and trainer disagree in already, and would hold it twice",
            )
        if self.objective.kernel.name == "dr_grpo" and self.advantage.estimator != "group_mean":
            yield (
                "advantage.estimator",
                f"kernel dr_grpo needs group_mean, found {self.advantage.estimator}; with another name the kernel grpo",
            )

    def overlong_problems(self, max_response_tokens: int) -> Iterator[tuple[str, str]]:
        shaping = self.overlong_shaping
        if shaping is not None and shaping.buffer_tokens > max_response_tokens:
            yield (
                "algorithm.overlong_shaping.buffer_tokens",
                f"{shaping.buffer_tokens} is more than rollout.max_response_tokens ({max_response_tokens})",
            )
