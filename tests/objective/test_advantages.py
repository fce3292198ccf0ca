"""From rewards to advantages, against Python's statistics, group by group."""

import statistics

import numpy as np
import pytest

from megatron_vespo.config import AdvantageConfig, ConfigError, OverlongShaping
from megatron_vespo.objective.advantages import ESTIMATORS, advantages, trained_groups, without_variance
from megatron_vespo.objective.overlong import overlong_penalty

REWARDS = [[1.0, 0.0, 0.0, 1.0, 0.0], [0.2, 0.9, 0.4, 0.4, 0.1], [0.0, 0.0, 0.0, 0.0, 0.0]]
BATCH = [r for group in REWARDS for r in group]
CENTRED = [r - statistics.fmean(group) for group in REWARDS for r in group]


def centred(group, config):
    return [r - statistics.fmean(group) for r in group]


def normalised(group, config):
    deviation = statistics.stdev(group) if config.std_ddof else statistics.pstdev(group)
    return [r / (deviation + config.std_epsilon) for r in centred(group, config)]


def leave_one_out(group, config):
    return [r - statistics.fmean(group[:i] + group[i + 1 :]) for i, r in enumerate(group)]


def whitened(group, config):
    deviation = statistics.stdev(BATCH) if config.std_ddof else statistics.pstdev(BATCH)
    return [(r - statistics.fmean(BATCH)) / (deviation + config.std_epsilon) for r in group]


def with_baseline(group, config):
    deviation = statistics.stdev(CENTRED) if config.std_ddof else statistics.pstdev(CENTRED)
    return [r / (deviation + config.std_epsilon) for r in centred(group, config)]


def likelihood(group, config):
    mean = statistics.fmean(group)
    return [(r - mean) / mean if mean else 0.0 for r in group]


FORMULAS = {
    "group_normalised": normalised,
    "group_mean": centred,
    "rloo": leave_one_out,
    "reinforce_plus_plus": whitened,
    "reinforce_plus_plus_baseline": with_baseline,
    "max_rl": likelihood,
}


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("estimator", FORMULAS)
def test_each_estimator_is_its_formula(estimator, ddof):
    config = AdvantageConfig(estimator=estimator, std_ddof=ddof, std_epsilon=1e-4)
    expected = [FORMULAS[estimator](group, config) for group in REWARDS]
    np.testing.assert_allclose(advantages(np.array(REWARDS), config), expected, rtol=1e-12, atol=1e-12)


def test_no_estimator_goes_unchecked():
    assert FORMULAS.keys() == ESTIMATORS.keys()


@pytest.mark.parametrize("estimator", [name for name in FORMULAS if name != "reinforce_plus_plus"])
def test_a_group_without_variance_has_no_advantage_even_after_rounding(estimator):
    rewards = np.array([[0.1, 0.1, 0.1], [0.0, 1.0, 0.0]])
    assert (advantages(rewards, AdvantageConfig(estimator=estimator))[0] == 0).all()


@pytest.mark.parametrize("estimator", FORMULAS)
def test_a_batch_without_variance_has_no_advantages(estimator):
    assert (advantages(np.full((2, 3), 0.1), AdvantageConfig(estimator=estimator)) == 0).all()


def test_groups_without_variance_are_counted_and_filtered_by_setting():
    rewards = np.array([[1.0, 0.0], [0.3, 0.3], [0.0, 0.0]])
    assert without_variance(rewards).tolist() == [False, True, True]
    assert trained_groups(rewards, AdvantageConfig()).all()
    assert trained_groups(rewards, AdvantageConfig(zero_variance_groups="filter")).tolist() == [True, False, False]


def test_max_rl_refuses_negative_rewards():
    with pytest.raises(ValueError, match="must not be negative"):
        advantages(np.array([[1.0, -0.5]]), AdvantageConfig(estimator="max_rl"))


def twice_centred(rewards, config):
    return config.options["factor"] * (rewards - rewards.mean(axis=1, keepdims=True))


def misshapen(rewards, config):
    return rewards[0]


def test_an_estimator_of_ones_own():
    config = AdvantageConfig(estimator="custom", function="test_advantages:twice_centred", options={"factor": 2.0})
    np.testing.assert_allclose(advantages(np.array([[1.0, 0.0]]), config), [[1.0, -1.0]])
    with pytest.raises(ValueError, match=r"expected finite advantages of shape \(1, 2\), found \(2,\)"):
        advantages(np.array([[1.0, 0.0]]), AdvantageConfig(estimator="custom", function="test_advantages:misshapen"))
    with pytest.raises(ConfigError, match=r"algorithm\.advantage\.function"):
        advantages(np.array([[1.0, 0.0]]), AdvantageConfig(estimator="custom", function="test_advantages:nothing"))


def test_overlong_responses_are_penalised_as_in_dapo():
    """Equation 13 of the paper with its numbers: a limit of 20,480 tokens, of which the last 4,096 are punished."""

    def paper(length, limit=20_480, cache=4_096):
        if length <= limit - cache:
            return 0.0
        return ((limit - cache) - length) / cache if length <= limit else -1.0

    lengths = np.array([1, 16_383, 16_384, 16_385, 18_000, 20_479, 20_480])
    found = overlong_penalty(lengths, 20_480, OverlongShaping(buffer_tokens=4_096))
    np.testing.assert_allclose(found, [-paper(length) for length in lengths], atol=1e-12)
    half = overlong_penalty(lengths, 20_480, OverlongShaping(buffer_tokens=4_096, penalty=0.5))
    np.testing.assert_allclose(half, found / 2)
