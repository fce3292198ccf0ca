"""Numbers of a step, against other ways to compute them."""

import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_batches import batch, loss_and_gradient

from megatron_vespo.config import ObjectiveConfig
from megatron_vespo.objective.diagnostics import (
    difference_diagnostics,
    effective_sample_share,
    mismatch_alarm,
    token_diagnostics,
    weight_diagnostics,
)
from megatron_vespo.objective.gradient_variance import gradient_variance
from megatron_vespo.objective.kernels import largest_coefficient
from megatron_vespo.objective.metrics import gradient_mass, measured_difference


def step(config=None, **further):
    """Diagnostics of one step, and what they were computed from."""
    config = config or ObjectiveConfig()
    data = batch(3, lengths=tuple(range(2, 42)), spread=0.4)
    _, _, metrics = loss_and_gradient(config, data, **further)
    sequences = {name: values.double().numpy() for name, values in metrics.sequences.items()}
    sums = {name: float(value) for name, value in metrics.sums.items()}
    row = weight_diagnostics(sequences, largest_coefficient(config.kernel))
    return row | token_diagnostics(sums) | difference_diagnostics(sums, "drift"), data


def trajectories(data):
    """(log W, phi, advantage, tokens) of each, by the formula."""
    found = []
    for i, (a, b) in enumerate(data.bounds()):
        chosen = [t for t in range(a, b) if data.response_mask[t]]
        if chosen:
            log_weight = sum(float(data.log_probs[t] - data.old_log_probs[t]) for t in chosen)
            advantage = float(data.advantages[i])
            c1, c2 = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
            phi = math.exp(c1 * log_weight + c2 * (1 - math.exp(log_weight)))
            found.append((log_weight, phi, advantage, len(chosen)))
    return found


def test_the_mass_of_the_gradient_that_rates_are_scaled_by():
    data = batch(3, lengths=tuple(range(2, 42)), spread=0.4)
    data.response_mask[slice(*data.bounds()[4])] = False  # masked whole: in neither sum
    _, _, metrics = loss_and_gradient(ObjectiveConfig(), data)
    kept, whole = gradient_mass(metrics).tolist()
    known = trajectories(data)
    assert len(known) < len(data.bounds())
    assert kept == pytest.approx(sum(phi * abs(advantage) for _, phi, advantage, _ in known), rel=1e-5)
    assert whole == pytest.approx(sum(abs(advantage) for _, _, advantage, _ in known), rel=1e-5)
    row = weight_diagnostics({name: values.double().numpy() for name, values in metrics.sequences.items()})
    assert math.log(kept / whole) == pytest.approx(row["gradient/log_kept"], abs=1e-6)


def test_weights_and_coefficients_by_sign_of_the_advantage():
    row, data = step()
    known = trajectories(data)
    for sign, some in (("positive", [k for k in known if k[2] > 0]), ("negative", [k for k in known if k[2] < 0])):
        assert row[f"{sign}/share"] == pytest.approx(len(some) / len(known))
        assert row[f"{sign}/log_weight/p50"] == pytest.approx(statistics.median(k[0] for k in some), rel=1e-5)
        assert row[f"{sign}/phi/p50"] == pytest.approx(statistics.median(k[1] for k in some), rel=1e-5)
        assert row[f"{sign}/phi/share_below_0.01"] == pytest.approx(sum(k[1] < 0.01 for k in some) / len(some))
    assert 0 < row["phi/share_below_0.01"] == pytest.approx(sum(k[1] < 0.01 for k in known) / len(known))


def test_how_the_gradient_is_spread():
    row, data = step()
    known = trajectories(data)
    pulls = [abs(phi * advantage) for _, phi, advantage, _ in known]
    moved = sorted((pull * k[3] for pull, k in zip(pulls, known, strict=True)), reverse=True)
    assert row["gradient/top_1pct_share"] == pytest.approx(moved[0] / sum(moved), rel=1e-5)
    kept = statistics.fmean(pulls) / statistics.fmean(abs(k[2]) for k in known)
    assert row["gradient/log_kept"] == pytest.approx(math.log(kept), rel=1e-4)
    assert row["gradient/ess"] == pytest.approx(sum(pulls) ** 2 / len(pulls) / sum(p * p for p in pulls), rel=1e-5)


def test_who_has_the_gradient():
    row, data = step()
    known = trajectories(data)
    middle = statistics.median(k[3] for k in known)
    chosen = {
        "positive": [k for k in known if k[2] > 0],
        "long": [k for k in known if k[3] > middle],
        "fallen": [k for k in known if k[0] < -1],
    }
    total = sum(abs(phi * advantage) * tokens for _, phi, advantage, tokens in known)
    for name, some in chosen.items():
        mass = sum(abs(phi * advantage) * tokens for _, phi, advantage, tokens in some)
        assert row[f"gradient/{name}_share"] == pytest.approx(mass / total, rel=1e-4) and 0 < mass < total


def test_a_length_bias_is_a_correlation():
    row, data = step()
    known = trajectories(data)
    expected = statistics.correlation([k[1] for k in known], [float(k[3]) for k in known])
    assert row["phi/length_correlation"] == pytest.approx(expected, rel=1e-4)


def test_the_variance_bound_holds_and_is_its_formula():
    row, data = step()
    known = trajectories(data)
    largest = {True: (2 / 3) ** 2 * math.exp(1), False: 1.5**3 * math.exp(-1)}
    bound = statistics.fmean((largest[k[2] >= 0] * k[2]) ** 2 for k in known)
    assert row["variance/bound"] == pytest.approx(bound, rel=1e-5)
    assert row["variance/kernel"] == pytest.approx(statistics.fmean((k[1] * k[2]) ** 2 for k in known), rel=1e-5)
    importance = statistics.fmean((math.exp(k[0]) * k[2]) ** 2 for k in known)
    assert row["variance/importance"] == pytest.approx(importance, rel=1e-4)
    assert row["variance/kernel"] <= row["variance/bound"] < row["variance/importance"]


def test_a_kernel_without_a_bound_has_none():
    row, _ = step(ObjectiveConfig(kernel="grpo"))
    assert "variance/bound" not in row


def test_clip_fractions_by_sign_of_the_advantage():
    row, data = step(ObjectiveConfig(kernel="grpo"))
    counts = {"positive": [0, 0], "negative": [0, 0]}
    for i, (a, b) in enumerate(data.bounds()):
        for t in range(a, b):
            if data.response_mask[t]:
                r, advantage = math.exp(data.log_probs[t] - data.old_log_probs[t]), float(data.advantages[i])
                sign = "positive" if advantage > 0 else "negative"
                counts[sign][0] += r > 1.2 if advantage > 0 else r < 0.8
                counts[sign][1] += 1
    for sign, (clipped, tokens) in counts.items():
        assert 0 < row[f"{sign}/clip_fraction"] == pytest.approx(clipped / tokens)
    assert "positive/clip_fraction" not in step()[0]


def test_entropies_and_divergences_are_means_over_tokens():
    row, data = step(entropy=torch.full((sum(range(2, 42)),), 1.25, dtype=torch.float64))
    chosen = data.response_mask
    difference = (data.log_probs - data.old_log_probs)[chosen]
    assert row["entropy/current"] == pytest.approx(1.25)
    assert row["entropy/old_policy"] == pytest.approx(float(-data.old_log_probs[chosen].mean()))
    assert row["drift/mean_abs"] == pytest.approx(float(difference.abs().mean()))
    assert row["drift/k1"] == pytest.approx(float(-difference.mean()))
    assert row["drift/k3"] == pytest.approx(float((difference.exp() - 1 - difference).mean()))
    assert row["drift/share_above_ln2"] == pytest.approx(float((difference.abs() > math.log(2)).double().mean()))


def test_k1_and_k3_estimate_the_divergence_of_two_distributions():
    generator = torch.Generator().manual_seed(0)
    mu, pi = (torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), 0) for _ in range(2))
    tokens = torch.multinomial(mu.exp(), 200_000, replacement=True, generator=generator)
    sums = measured_difference(pi[tokens], mu[tokens], torch.ones(len(tokens), dtype=torch.bool))
    row = difference_diagnostics({name: float(value) for name, value in sums.items()}, "drift")
    exact = float((mu.exp() * (mu - pi)).sum())
    assert row["drift/k1"] == pytest.approx(exact, rel=0.03)
    assert row["drift/k3"] == pytest.approx(exact, rel=0.03)
    assert row["drift/share_above_ln2"] == pytest.approx(float(mu.exp()[(mu - pi).abs() > np.log(2)].sum()), abs=0.01)


def test_effective_sample_share():
    assert effective_sample_share(np.full(7, 3.3)) == pytest.approx(1.0)
    assert effective_sample_share(np.array([1000.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
    weights = np.array([0.5, 1.5, 2.0])
    assert effective_sample_share(np.log(weights)) == pytest.approx(weights.sum() ** 2 / (3 * (weights**2).sum()))


def columns(log_weight, **further):
    ones = np.ones(len(log_weight))
    base = {"log_weight": log_weight, "phi": ones, "advantage": ones, "tokens": ones, "abs_phi_advantage": ones}
    return base | further


def test_quantiles_of_weights_are_exact():
    row = weight_diagnostics(columns(np.linspace(-1, 1, 101)))
    assert row["log_weight/p10"] == pytest.approx(-0.8) and row["log_weight/max"] == 1.0


def test_what_is_not_trained_on_does_not_count():
    tokens = np.array([3.0, 0.0, 2.0])
    row = weight_diagnostics(columns(np.array([0.1, 9.0, 0.3]), tokens=tokens))
    assert row["log_weight/max"] == pytest.approx(0.3) and row["log_weight/mean"] == pytest.approx(0.2)


def test_a_step_without_anything_has_no_numbers():
    row = weight_diagnostics(columns(np.zeros(2), tokens=np.zeros(2)))
    assert all(math.isnan(value) for name, value in row.items() if not name.endswith("share"))


def test_a_step_without_advantages_says_nothing_of_its_gradient():
    zeros = np.zeros(4)
    row = weight_diagnostics(columns(zeros, advantage=zeros, abs_phi_advantage=zeros))
    assert math.isnan(row["gradient/log_kept"]) and math.isnan(row["gradient/top_1pct_share"])
    assert math.isnan(row["negative/phi/p50"]) and row["negative/share"] == 0.0


def test_a_gradient_that_the_kernel_holds_back_entirely_is_starved():
    row = weight_diagnostics(columns(np.full(3, 50.0), phi=np.zeros(3), abs_phi_advantage=np.zeros(3)))
    assert row["gradient/log_kept"] == -math.inf and row["phi/share_below_0.01"] == 1.0


@pytest.mark.parametrize(("std", "alarm"), [(0.0, False), (0.5, False), (0.51, True), (math.nan, False)])
def test_the_alarm_rings_above_half(std, alarm):
    assert mismatch_alarm(std) is alarm


def test_the_variance_of_a_gradient_is_estimated_without_bias():
    """Sums of M independent vectors, very often, against the variance that is known."""
    generator = np.random.default_rng(0)
    count, dimensions, scale = 4, 10, 0.7
    mean = np.linspace(-1, 1, dimensions)
    found = []
    for _ in range(4000):
        parts = mean + scale * generator.standard_normal((count, dimensions))
        # alone, a part of 3 of the step's 12 tokens has a gradient 4 times as large as what it adds to the step's
        alone = [(4 * float(np.linalg.norm(part)), 3.0) for part in parts]
        found.append(gradient_variance(alone, float(np.linalg.norm(parts.sum(0))), 12.0)["gradient/variance"])
    assert statistics.fmean(found) == pytest.approx(count * dimensions * scale**2, rel=0.02)


def test_equal_parts_have_no_variance():
    row = gradient_variance([(4.0, 1), (4.0, 1)], 4.0, 2)
    assert row == {"gradient/variance": 0.0, "gradient/noise_share": 0.0}
    with pytest.raises(ValueError, match="at least two"):
        gradient_variance([(1.0, 1)], 1.0, 1)


def test_every_number_is_explained():
    documented = set(re.findall(r"`([^`\s]+)`", (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()))
    zeros = torch.zeros(sum(range(2, 42)), dtype=torch.float64)
    row, _ = step(
        ObjectiveConfig(kernel={"name": "grpo", "dual_clip": 3.0}),
        entropy=zeros,
        kl_reference_log_probs=zeros,
        engine_log_weights=zeros,
    )
    assert row.keys() <= documented
    assert gradient_variance([(1.0, 1), (1.0, 1)], 1.0, 2).keys() <= documented
