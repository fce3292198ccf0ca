"""From rewards to advantages. Rewards and advantages are [groups, G]: the responses to one prompt are a row."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.config import AdvantageConfig
from megatron_vespo.targets import load_function

Array = NDArray[np.float64]


def advantages(rewards: Array, config: AdvantageConfig) -> Array:
    """Those of the configured estimator. `rewards` are those of a whole rollout batch: two estimators look at all of it.

    Raises:
        ConfigError: `config.function` does not name a function.
        ValueError: a function of one's own gave something else than a finite [groups, G] array.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if config.estimator != "custom":
        return ESTIMATORS[config.estimator](rewards, config)
    own = np.asarray(advantage_function(config)(rewards, config), dtype=np.float64)
    if own.shape != rewards.shape or not np.isfinite(own).all():
        raise ValueError(f"{config.function}: expected finite advantages of shape {rewards.shape}, found {own.shape}")
    return own


def advantage_function(config: AdvantageConfig) -> Callable[[Array, AdvantageConfig], Array]:
    """Of `estimator: custom`. Raises ConfigError where `function` does not name a function."""
    return load_function(config.function or "", "algorithm.advantage.function")


def without_variance(rewards: Array) -> NDArray[np.bool_]:
    """Groups whose rewards are all equal: [groups, G] -> [groups]. Nothing is learned from comparing them."""
    return np.ptp(rewards, axis=1) == 0


def trained_groups(rewards: Array, config: AdvantageConfig) -> NDArray[np.bool_]:
    """Groups to train on: [groups, G] -> [groups]; all of them unless `zero_variance_groups: filter`.

    DAPO (arXiv 2503.14476) samples further prompts in the place of filtered ones; here a step is smaller without them.
    """
    if config.zero_variance_groups == "keep":
        return np.ones(len(rewards), dtype=np.bool_)
    return ~without_variance(rewards)


def group_mean(rewards: Array, config: AdvantageConfig) -> Array:
    """r - mean of the group (Dr. GRPO, arXiv 2503.20783). Exactly 0 where all rewards of a group are equal."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    centred[without_variance(rewards)] = 0.0
    return centred


def group_normalised(rewards: Array, config: AdvantageConfig) -> Array:
    """(r - mean) / (standard deviation + epsilon) in each group (GRPO, arXiv 2402.03300)."""
    deviation = rewards.std(axis=1, ddof=config.std_ddof, keepdims=True)
    return group_mean(rewards, config) / (deviation + config.std_epsilon)


def rloo(rewards: Array, config: AdvantageConfig) -> Array:
    """r - mean of the group's other rewards (RLOO, arXiv 2402.14740)."""
    size = rewards.shape[1]
    return group_mean(rewards, config) * (size / (size - 1))


def reinforce_plus_plus(rewards: Array, config: AdvantageConfig) -> Array:
    """(r - mean) / (standard deviation + epsilon) over the whole batch (REINFORCE++, arXiv 2501.03262)."""
    if np.ptp(rewards) == 0:
        return np.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std(ddof=config.std_ddof) + config.std_epsilon)


def reinforce_plus_plus_baseline(rewards: Array, config: AdvantageConfig) -> Array:
    """(r - mean of the group) / (standard deviation of that over the whole batch + epsilon) (arXiv 2501.03262).

    Over trajectories, where the mean over the batch is 0 already; OpenRLHF and verl weigh each of them by its tokens.
    """
    centred = group_mean(rewards, config)
    return centred / (centred.std(ddof=config.std_ddof) + config.std_epsilon)


def max_rl(rewards: Array, config: AdvantageConfig) -> Array:
    """(r - mean) / mean of the group, 0 where the mean is 0 (maximum-likelihood RL, arXiv 2602.02710).

    Rewards are meant to be 0 or 1: a prompt solved with probability p then weighs 1 / p.

    Raises:
        ValueError: a reward is negative.
    """
    if (rewards < 0).any():
        raise ValueError("max_rl divides by the mean reward of a group: rewards must not be negative")
    mean = rewards.mean(axis=1, keepdims=True)
    return np.divide(group_mean(rewards, config), mean, out=np.zeros_like(rewards), where=mean > 0)


ESTIMATORS: dict[str, Callable[[Array, AdvantageConfig], Array]] = {
    "group_normalised": group_normalised,
    "group_mean": group_mean,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "max_rl": max_rl,
}
"""A new estimator is a function and a line here; or one of your own, outside (`estimator: custom`)."""
