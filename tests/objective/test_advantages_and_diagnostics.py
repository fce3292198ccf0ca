import statistics

import numpy as np
import pytest
import torch

from megatron_vespo.config import AdvantageConfig
from megatron_vespo.objective.advantages import group_normalised
from megatron_vespo.objective.diagnostics import difference_diagnostics, effective_sample_share, weight_diagnostics
from megatron_vespo.objective.loss import difference_metrics


@pytest.mark.parametrize(("ddof", "deviation"), [(1, statistics.stdev), (0, statistics.pstdev)])
def test_advantages_are_normalised_in_each_group(ddof, deviation):
    rewards = [[1.0, 0.0, 0.0, 1.0, 0.0], [0.2, 0.9, 0.4, 0.4, 0.1]]
    got = group_normalised(np.array(rewards), AdvantageConfig(std_ddof=ddof, std_epsilon=1e-6))
    for row, group in zip(got, rewards, strict=True):
        expected = [(r - statistics.fmean(group)) / (deviation(group) + 1e-6) for r in group]
        np.testing.assert_allclose(row, expected, rtol=1e-12)


def test_a_group_without_variance_has_no_advantage_even_after_rounding():
    assert (group_normalised(np.full((2, 3), 0.1), AdvantageConfig()) == 0).all()


def test_effective_sample_share():
    assert effective_sample_share(np.full(7, 3.3)) == pytest.approx(1.0)
    assert effective_sample_share(np.array([1000.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
    weights = np.array([0.5, 1.5, 2.0])
    assert effective_sample_share(np.log(weights)) == pytest.approx(weights.sum() ** 2 / (3 * (weights**2).sum()))


def test_k1_and_k3_estimate_the_divergence_of_two_distributions():
    generator = torch.Generator().manual_seed(0)
    mu, pi = (torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), 0) for _ in range(2))
    tokens = torch.multinomial(mu.exp(), 200_000, replacement=True, generator=generator)
    metrics = difference_metrics(pi[tokens], mu[tokens], torch.ones(len(tokens), dtype=torch.bool))
    row = difference_diagnostics({name: float(value) for name, value in metrics.sums.items()}, "drift")
    exact = float((mu.exp() * (mu - pi)).sum())
    assert row["drift/k1"] == pytest.approx(exact, rel=0.03)
    assert row["drift/k3"] == pytest.approx(exact, rel=0.03)
    assert row["entropy/behavior"] == pytest.approx(float(-(mu.exp() * mu).sum()), rel=0.01)
    assert row["drift/share_above_ln2"] == pytest.approx(float(mu.exp()[(mu - pi).abs() > np.log(2)].sum()), abs=0.01)


def test_quantiles_of_weights_are_exact():
    log_weight = np.linspace(-1, 1, 101)
    row = weight_diagnostics(log_weight, np.ones(101), np.ones(101))
    assert row["log_weight/p10"] == pytest.approx(-0.8) and row["log_weight/max"] == 1.0
