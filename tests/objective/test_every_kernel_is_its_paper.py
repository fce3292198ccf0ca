"""Value and gradient of every kernel against autograd of the formula of its paper, in float64."""

import itertools

import pytest
import torch
from packed_batches import batch, loss_and_gradient
from published_objectives import OBJECTIVES, weight

from megatron_vespo.config import ObjectiveConfig
from megatron_vespo.objective.kernels import KERNELS

AGGREGATIONS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length")


def published(objective, data, aggregation="token_mean", constant_length=16):
    """Minus the objective, aggregated over the responses that have a token, and its gradient by all log-probs."""
    log_probs = data.log_probs.detach().double().requires_grad_()
    old, mask = data.old_log_probs.double(), data.response_mask
    numerators, counts = [], []
    for i, (a, b) in enumerate(data.bounds()):
        chosen = [t for t in range(a, b) if mask[t]]
        if not chosen:
            continue
        own = data.advantages.double()
        advantages = own[chosen] if len(own) == len(mask) else own[i].expand(len(chosen))
        per_token = objective(log_probs[chosen], old[chosen], advantages)
        divisor = {"sequence_mean_token_mean": len(chosen), "constant_length": constant_length}.get(aggregation, 1)
        numerators.append(per_token.sum() / divisor)
        counts.append(len(chosen) if aggregation == "token_mean" else 1)
    loss = -sum(numerators) / sum(counts)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), gradient


def config(kernel, aggregation="token_mean"):
    length = {"constant_length": 16} if aggregation == "constant_length" else {}
    return ObjectiveConfig(kernel=kernel, aggregation=aggregation, **length)


def assert_published(name, data, aggregation, rtol, atol):
    kernel, objective = OBJECTIVES[name]
    loss, gradient, _ = loss_and_gradient(config(kernel, aggregation), data)
    expected_loss, expected_gradient = published(objective, data, aggregation)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=rtol, atol=atol)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=atol)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_in_float64(name, seed):
    assert_published(name, batch(seed), "token_mean", rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_in_float32(name):
    assert_published(name, batch(3, dtype=torch.float32), "token_mean", rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "aggregation"), list(itertools.product(("vespo", "grpo", "gspo", "sapo", "cispo"), AGGREGATIONS))
)
def test_every_aggregation(name, aggregation):
    assert_published(name, batch(1), aggregation, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if not name.startswith("gspo,") and name != "gspo"])
def test_an_advantage_for_each_token(name):
    assert_published(name, batch(2).with_token_advantages(), "token_mean", rtol=1e-10, atol=1e-13)


def test_gspo_refuses_an_advantage_for_each_token():
    with pytest.raises(ValueError, match="gspo_token"):
        loss_and_gradient(config("gspo"), batch().with_token_advantages())


def test_full_importance_sampling_has_the_gradient_of_the_weighted_reward():
    data = batch(4)

    def weighted_reward(log_probs, old, advantages):
        return (weight(log_probs, old) * advantages[0])[None]

    _, gradient, _ = loss_and_gradient(config("importance", "sequence_mean_token_sum"), data)
    _, expected = published(weighted_reward, data, "sequence_mean_token_sum")
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)


def test_no_kernel_goes_unchecked():
    checked = {kernel if isinstance(kernel, str) else kernel["name"] for kernel, _ in OBJECTIVES.values()}
    assert checked == set(KERNELS)


def test_the_formulas_do_clip_here():
    """Otherwise the clipped kernels would be checked only where they are all alike."""
    for name in ("ppo", "grpo", "grpo, dual clip", "dapo", "gspo", "truncated_importance", "topr", "cispo, two bounds"):
        _, _, metrics = loss_and_gradient(config(OBJECTIVES[name][0]), batch(0))
        clipped = sum(int(metrics.sums[f"{sign}_clipped"]) for sign in ("positive", "negative"))
        assert 0 < clipped < int(metrics.sums["tokens"]), name
