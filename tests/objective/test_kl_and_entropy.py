"""The KL penalty and the entropy bonus: estimators, gradients, and what those are gradients of."""

import math

import pytest
import torch
from packed_batches import batch, loss_and_gradient
from published_objectives import vespo
from test_every_kernel_is_its_paper import published

from megatron_vespo.config import KLConfig, ObjectiveConfig
from megatron_vespo.objective import policy_loss
from megatron_vespo.objective.kl import divergence, kl_penalty

ESTIMATORS = {
    "k1": lambda lp, ref: lp - ref,
    "k2": lambda lp, ref: (lp - ref) ** 2 / 2,
    "k3": lambda lp, ref: torch.exp(ref - lp) - 1 + lp - ref,
}


def reference_of(data):
    generator = torch.Generator().manual_seed(21)
    return data.log_probs + 0.4 * torch.randn(len(data.log_probs), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_mean"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_term_of_the_loss_is_the_formula(estimator, aggregation):
    data = batch(6)
    reference = reference_of(data)
    kl = KLConfig(coefficient=0.3, estimator=estimator)
    config = ObjectiveConfig(kl=kl, aggregation=aggregation)
    found = loss_and_gradient(config, data, kl_reference_log_probs=reference)[:2]

    penalty = published(
        lambda lp, old, A: -0.3 * ESTIMATORS[estimator](lp, reference[positions_of(data, lp)]), data, aggregation
    )
    objective = published(vespo, data, aggregation)
    expected = tuple(a + b for a, b in zip(objective, penalty, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def positions_of(data, log_probs):
    """Where these log-probs stand in the batch: all of them differ."""
    return torch.tensor([int((data.log_probs == value).nonzero()) for value in log_probs.detach()])


@pytest.fixture
def distributions():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    return logits, torch.log_softmax(torch.randn(9, generator=generator, dtype=torch.float64), 0)


def mean_gradient(estimator, logits, reference):
    """Of the estimator in the loss, over all tokens that the policy can sample."""
    log_probs = torch.log_softmax(logits, 0)
    _, slope = divergence(estimator, (log_probs - reference).detach())
    return torch.autograd.grad((log_probs.exp().detach() * slope * log_probs).sum(), logits)[0]


def test_whose_gradient_each_estimator_is(distributions):
    logits, reference = distributions
    log_probs = torch.log_softmax(logits, 0)
    reverse = (log_probs.exp() * (log_probs - reference)).sum()
    forward = (reference.exp() * (reference - log_probs)).sum()
    of_reverse, of_forward = (torch.autograd.grad(kl, logits, retain_graph=True)[0] for kl in (reverse, forward))
    torch.testing.assert_close(mean_gradient("k1", logits, reference), torch.zeros(9, dtype=torch.float64))
    torch.testing.assert_close(mean_gradient("k2", logits, reference), of_reverse)
    torch.testing.assert_close(mean_gradient("k3", logits, reference), of_forward)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_estimates_are_unbiased(distributions, estimator):
    logits, reference = distributions
    log_probs = torch.log_softmax(logits.detach(), 0)
    estimate, _ = divergence(estimator, log_probs - reference)
    exact = float((log_probs.exp() * (log_probs - reference)).sum())
    assert float((log_probs.exp() * estimate).sum()) == pytest.approx(exact)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_penalty_of_the_reward_is_summed_over_the_response(estimator):
    data = batch(6)
    reference = reference_of(data)
    kl = KLConfig(coefficient=0.3, estimator=estimator, place="reward")
    penalty = kl_penalty(kl, data.log_probs, reference, data.response_mask, data.cu_seqlens)
    for found, (a, b) in zip(penalty, data.bounds(), strict=True):
        chosen = [t for t in range(a, b) if data.response_mask[t]]
        expected = sum(0.3 * float(ESTIMATORS[estimator](data.log_probs[t], reference[t])) for t in chosen)
        assert float(found) == pytest.approx(expected, abs=1e-12)
    # then it is a part of the advantage, and the loss has no term of its own
    config = ObjectiveConfig(kl=kl)
    with_reference = loss_and_gradient(config, data, kl_reference_log_probs=reference)
    torch.testing.assert_close(with_reference[:2], loss_and_gradient(ObjectiveConfig(), data)[:2])


def test_divergence_from_the_reference_is_measured():
    data = batch(6)
    reference = reference_of(data)
    _, _, metrics = loss_and_gradient(ObjectiveConfig(), data, kl_reference_log_probs=reference)
    chosen = data.response_mask
    for name in ("k1", "k3"):
        expected = float(ESTIMATORS[name](data.log_probs[chosen], reference[chosen]).sum())
        assert float(metrics.sums[f"kl_{name}"]) == pytest.approx(expected)


def test_a_penalty_without_a_reference_is_an_error():
    with pytest.raises(ValueError, match="kl_reference_log_probs is missing"):
        loss_and_gradient(ObjectiveConfig(kl=KLConfig(coefficient=0.1)), batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_stays_finite(dtype):
    for estimator in ESTIMATORS:
        estimate, slope = divergence(estimator, torch.tensor([-1e4, 1e4, 0.0], dtype=dtype))
        assert estimate.isfinite().all() and slope.isfinite().all()


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_sum"])
def test_the_bonus_is_the_mean_entropy(aggregation):
    """Through a softmax: log-probs and entropy of the same logits."""
    data = batch(8)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(data.log_probs), 5, generator=generator, dtype=torch.float64).requires_grad_()
    distribution = torch.log_softmax(logits, 1)
    entropy = -(distribution.exp() * distribution).sum(1)
    config = ObjectiveConfig(entropy_coefficient=0.2, aggregation=aggregation)

    def loss_of(config, entropy):
        return policy_loss(
            config,
            log_probs=distribution[:, 0],
            old_log_probs=data.old_log_probs,
            advantages=data.advantages,
            response_mask=data.response_mask,
            cu_seqlens=data.cu_seqlens,
            entropy=entropy,
        )

    with_bonus, metrics = loss_of(config, entropy)
    without, _ = loss_of(ObjectiveConfig(aggregation=aggregation), None)
    chosen = data.response_mask
    responses = sum(bool(chosen[a:b].any()) for a, b in data.bounds())
    bonus = 0.2 * entropy[chosen].sum() / (chosen.sum() if aggregation == "token_mean" else responses)
    torch.testing.assert_close(with_bonus, without - bonus, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (with_bonus, without - bonus)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert float(metrics.sums["entropy"]) == pytest.approx(float(entropy.detach()[chosen].sum()))


def test_garbage_entropy_outside_responses_is_never_seen():
    data = batch(8)
    entropy = torch.where(data.response_mask, 1.0, math.nan)
    loss, gradient, _ = loss_and_gradient(ObjectiveConfig(entropy_coefficient=0.1), data, entropy=entropy)
    assert loss.isfinite() and gradient.isfinite().all()


def test_a_bonus_without_entropy_is_an_error():
    with pytest.raises(ValueError, match="entropy is missing"):
        loss_and_gradient(ObjectiveConfig(entropy_coefficient=0.1), batch())
