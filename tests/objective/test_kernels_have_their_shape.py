"""Properties of kernels that hold for every weight, found by search."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_batches import batch, loss_and_gradient
from published_objectives import OBJECTIVES

from megatron_vespo.config import KernelCoefficients, ObjectiveConfig
from megatron_vespo.config.objective import VespoKernel
from megatron_vespo.objective import policy_loss
from megatron_vespo.objective.kernels import largest_coefficient
from megatron_vespo.objective.kernels.vespo import log_phi

EXPONENTS = st.floats(0.1, 8.0)
LOG_WEIGHTS = st.floats(-50.0, 6.0)


def phi_at(log_weights, c1, c2):
    """phi as the loss uses it: one response of one token for each log W, advantage 1, so the gradient is -phi."""
    n = len(log_weights)
    side = KernelCoefficients(c1=c1, c2=c2)
    data = batch(lengths=(1,) * n)
    data.response_mask[:] = True
    data.advantages[:] = 1.0
    data.old_log_probs[:] = data.log_probs - torch.tensor(log_weights, dtype=torch.float64)
    config = ObjectiveConfig(kernel=VespoKernel(positive=side, negative=side), aggregation="sequence_mean_token_sum")
    _, gradient, _ = loss_and_gradient(config, data, denominator=1)
    return -gradient


@given(EXPONENTS, EXPONENTS)
@settings(deadline=None, max_examples=50)
def test_phi_is_exactly_one_at_one(c1, c2):
    assert log_phi(torch.zeros(1, dtype=torch.float64), c1, c2).exp().item() == 1.0


@given(EXPONENTS, EXPONENTS, st.lists(LOG_WEIGHTS, min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_phi_is_largest_at_c1_over_c2(c1, c2, log_weights):
    peak = (c1 / c2) ** c1 * math.exp(c2 - c1)
    at_peak, *others = phi_at([math.log(c1 / c2), *log_weights], c1, c2).tolist()
    assert at_peak == pytest.approx(peak, rel=1e-9)
    assert max(others) <= peak * (1 + 1e-9)
    side = {"c1": c1, "c2": c2}
    kernel = ObjectiveConfig(kernel={"name": "vespo", "positive": side, "negative": side}).kernel
    assert largest_coefficient(kernel) == pytest.approx((peak, peak), rel=1e-9)


@given(EXPONENTS, EXPONENTS, LOG_WEIGHTS, st.floats(0.01, 3.0))
@settings(deadline=None, max_examples=50)
def test_phi_rises_to_its_peak_and_falls_behind_it(c1, c2, log_weight, step):
    nearer, farther = phi_at([log_weight, log_weight + math.copysign(step, log_weight - math.log(c1 / c2))], c1, c2)
    assert farther < nearer or (farther == nearer and nearer < 1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_coefficients_are_one_on_policy_and_never_beyond_their_bound(name):
    config = ObjectiveConfig(kernel=OBJECTIVES[name][0])
    positive, negative = largest_coefficient(config.kernel)
    for seed, spread in enumerate((0.0, 0.2, 1.0, 4.0)):
        data = batch(seed, lengths=(1,) * 200, spread=spread)
        _, _, metrics = loss_and_gradient(config, data)
        trained = metrics.sequences["tokens"] > 0
        phi, advantages = metrics.sequences["phi"][trained], metrics.sequences["advantage"][trained]
        if spread == 0.0:
            torch.testing.assert_close(phi, torch.ones_like(phi))
        assert (phi >= 0).all()
        assert (phi[advantages >= 0] <= positive * (1 + 1e-6)).all()
        assert (phi[advantages < 0] <= negative * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_coefficients_and_metrics_carry_no_gradient(name):
    data = batch()
    log_probs = data.log_probs.clone().requires_grad_()
    loss, metrics = policy_loss(
        ObjectiveConfig(kernel=OBJECTIVES[name][0]),
        log_probs=log_probs,
        old_log_probs=data.old_log_probs,
        advantages=data.advantages,
        response_mask=data.response_mask,
        cu_seqlens=data.cu_seqlens,
    )
    (gradient,) = torch.autograd.grad(loss, log_probs, create_graph=True)
    assert not gradient.requires_grad
    assert not any(values.requires_grad for values in (*metrics.sums.values(), *metrics.sequences.values()))
