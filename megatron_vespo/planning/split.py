"""Which of so many GPUs should sample and which should train: every split is simulated, the fastest is recommended."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_vespo.config import ConfigError, TrainConfig
from megatron_vespo.config.planning import RatesConfig
from megatron_vespo.planning.rates import Cluster, DecodeSpeed, EngineRates, TrainerRates
from megatron_vespo.planning.simulation import Outcome, simulate
from megatron_vespo.planning.workload import Workload, lognormal_lengths

SPLITS = 12
"""That are looked at, at most."""
WITHIN = 0.02
"""Splits this much slower than the fastest count as equal, and the one with the least staleness is recommended."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and responses. Responses are lognormal.

    Attributes:
        sigma: standard deviation of the response's logarithm.
        longest: where responses are cut.
    """

    prompt: int
    median: float
    sigma: float
    longest: int

    @property
    def mean_response(self) -> float:
        """Before the cut."""
        return min(self.longest, self.median * math.exp(self.sigma**2 / 2))


@dataclass(frozen=True)
class Row:
    """One simulated split.

    Attributes:
        max_staleness: S; None: the synchronous loop.
        step_seconds: of an optimizer step, in the middle of the simulated run.
    """

    rollout_gpus: int
    train_gpus: int
    max_staleness: int | None
    step_seconds: float
    trajectories_per_second: float
    tokens_per_second: float
    outcome: Outcome

    @property
    def mean_staleness(self) -> float:
        ages = self.outcome.staleness
        return sum(age * count for age, count in ages.items()) / sum(ages.values())

    def figures(self) -> dict:
        """For JSON."""
        return {
            "rollout_gpus": self.rollout_gpus,
            "train_gpus": self.train_gpus,
            "max_staleness": self.max_staleness,
            "step_seconds": round(self.step_seconds, 2),
            "trajectories_per_second": round(self.trajectories_per_second, 3),
            "response_tokens_per_second": round(self.tokens_per_second, 1),
            "generation": round(self.outcome.generation, 4),
            "generation_speed": round(self.outcome.generation_speed, 4),
            "training": round(self.outcome.training, 4),
            "staleness": {str(age): count for age, count in sorted(self.outcome.staleness.items())},
        }


def lengths_of(config: TrainConfig, prompt: int | None, median: float | None, sigma: float | None) -> Lengths:
    """What is given, else `rollout.response_length`, else a quarter of the longest response with sigma 0.8; prompts of
    half of what is allowed."""
    longest, dial = config.rollout.max_response_tokens, config.rollout.response_length
    return Lengths(
        prompt=prompt or max(1, config.data.max_prompt_tokens // 2),
        median=median or (dial.median if dial else longest / 4),
        sigma=sigma if sigma is not None else (dial.sigma if dial else 0.8),
        longest=longest,
    )


def splits(config: TrainConfig, gpus: int, rates: RatesConfig) -> list[int]:
    """GPUs that sample, of up to `SPLITS` splits in which engines and trainer both fit.

    Raises:
        ConfigError: there is none.
    """
    layout = config.policy.layout
    of_model = math.lcm(layout.model_ranks, layout.expert_model_ranks)
    possible = [r for r in range(rates.engine_gpus, gpus, rates.engine_gpus) if (gpus - r) % of_model == 0]
    if not possible:
        raise ConfigError(
            f"--gpus {gpus}: an engine needs {rates.engine_gpus} GPUs and policy.layout a multiple of {of_model}: no "
            "split has both. Use more GPUs, or a smaller layout"
        )
    if len(possible) <= SPLITS:
        return possible
    return [possible[round(Fraction(i * (len(possible) - 1), SPLITS - 1))] for i in range(SPLITS)]


def simulate_split(
    config: TrainConfig, gpus: int, rollout_gpus: int, rates: RatesConfig, lengths: Lengths, bound: int | None
) -> Row:
    algorithm, rollout, layout = config.algorithm, config.rollout, config.policy.layout
    of_model = math.lcm(layout.model_ranks, layout.expert_model_ranks)
    cluster = Cluster(
        rollout_gpus // rates.engine_gpus,
        engine_rates(rates, lengths),
        TrainerRates(
            rates.train_tokens_per_second_per_gpu * (gpus - rollout_gpus),
            rates.step_seconds,
            (gpus - rollout_gpus) // of_model,
        ),
        rates.sync_seconds,
    )
    sync_every = algorithm.sync_every
    # The first steps fill the pipeline and the last ones empty it; what is between them is counted. Groups that were
    # started together may end together, and then last for S + 1 steps, so two such waves are looked at.
    edge = sync_every * math.ceil(((bound or 0) + 1) / sync_every)
    counted = max(4 * sync_every, 2 * edge)
    workload = Workload(
        steps=2 * edge + counted,
        groups_per_step=algorithm.prompts_per_step,
        group_size=rollout.group_size,
        sync_every=sync_every,
        max_staleness=bound,
        concurrent_groups=rollout.concurrent_groups,
        prompt_tokens=lengths.prompt,
        response_tokens=lognormal_lengths(lengths.median, lengths.sigma, lengths.longest, config.seed),
        update="abort" if algorithm.asynchronous is None else algorithm.asynchronous.update,
    )
    outcome = simulate(cluster, workload)
    ends = outcome.step_ends
    step_seconds = (ends[-edge - 1] - ends[edge - 1]) / counted
    per_step = algorithm.prompts_per_step * rollout.group_size
    tokens = outcome.response_tokens / outcome.trajectories
    return Row(
        rollout_gpus,
        gpus - rollout_gpus,
        bound,
        step_seconds,
        per_step / step_seconds,
        per_step * tokens / step_seconds,
        outcome,
    )


def engine_rates(rates: RatesConfig, lengths: Lengths) -> EngineRates:
    speed = DecodeSpeed(tuple((point.running, point.running / point.tokens_per_second) for point in rates.decode))
    most = rates.cache_tokens / (lengths.prompt + lengths.mean_response)
    # Beyond the last measured point a line would promise what nobody has seen.
    max_running = max(1, min(int(most), int(rates.decode[-1].running)))
    return EngineRates(speed, max_running, rates.prefill_tokens_per_second)


def plan_split(
    config: TrainConfig, gpus: int, rates: RatesConfig, lengths: Lengths, bounds: Sequence[int | None]
) -> list[Row]:
    """Every split with every bound.

    Raises:
        ConfigError: no split fits, or a bound is less than sync_every - 1.
    """
    for bound in bounds:
        if bound is not None and bound < config.algorithm.sync_every - 1:
            raise ConfigError(
                f"--max-staleness {bound}: less than sync_every - 1 ({config.algorithm.sync_every} - 1): the last step "
                "before an update could never be taken"
            )
    every = splits(config, gpus, rates)
    return [simulate_split(config, gpus, r, rates, lengths, bound) for bound in bounds for r in every]


def recommended(rows: Sequence[Row]) -> Row:
    """The least stale of those that are about as fast as the fastest."""
    fastest = max(row.trajectories_per_second for row in rows)
    near = [row for row in rows if row.trajectories_per_second >= (1 - WITHIN) * fastest]
    return min(near, key=lambda row: (row.mean_staleness, row.rollout_gpus))


def bounds_of(config: TrainConfig, asked: Sequence[int]) -> list[int | None]:
    """What is asked for, else the run's own; None is its synchronous loop."""
    if asked:
        return list(asked)
    return [None if config.algorithm.asynchronous is None else config.algorithm.max_staleness]
