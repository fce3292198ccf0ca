"""Whatever finite log-probs come, loss, gradient and metrics are finite; what cannot be trained on is an error."""

from dataclasses import replace

import pytest
import torch
from packed_batches import Batch, batch, loss_and_gradient
from published_objectives import OBJECTIVES

from megatron_vespo.config import ObjectiveConfig
from megatron_vespo.objective.importance import NotFiniteError


def assert_finite(loss, gradient, metrics):
    assert loss.isfinite() and gradient.isfinite().all()
    for values in (*metrics.sums.values(), *metrics.sequences.values()):
        assert values.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_ratios_beyond_all_bounds(name, dtype):
    old = torch.tensor([-1.0, -1e4, -1.0, -1e4, -1e-8, -3.0])
    log_probs = torch.tensor([-1e4, -1.0, -1.0, -1e-8, -1e4, -3.0])
    data = Batch((1, 1, 1, 1, 2), log_probs, old, torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0]), torch.ones(6) > 0)
    assert_finite(*loss_and_gradient(ObjectiveConfig(kernel=OBJECTIVES[name][0]), data.to(dtype)))


def test_vespo_gives_no_weight_to_what_is_far_off():
    old, log_probs = torch.tensor([-1.0, -1e4, -1.0]), torch.tensor([-1e4, -1.0, -1.0])
    data = Batch((1, 1, 1), log_probs, old, torch.tensor([1.0, -1.0, 0.0]), torch.ones(3) > 0)
    _, gradient, metrics = loss_and_gradient(ObjectiveConfig(), data)
    assert metrics.sequences["phi"].tolist() == [0.0, 0.0, 1.0]
    assert gradient.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_responses_of_32k_tokens(name):
    data = batch(1, (32_768, 32_768), spread=0.05, dtype=torch.float32)
    loss, gradient, metrics = loss_and_gradient(ObjectiveConfig(kernel=OBJECTIVES[name][0]), data)
    assert_finite(loss, gradient, metrics)


def test_log_w_of_32k_tokens_is_exact():
    tokens = 32_768
    log_probs = torch.full((tokens,), -0.7)
    data = Batch((tokens,), log_probs, torch.full((tokens,), -0.7001), torch.ones(1), torch.ones(tokens) > 0)
    _, _, metrics = loss_and_gradient(ObjectiveConfig(), data)
    expected = float((data.log_probs.double() - data.old_log_probs.double()).sum())
    assert float(metrics.sequences["log_weight"]) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_to_train_on_gives_zero(name):
    data = batch(lengths=(2, 3))
    data.response_mask[:] = False
    loss, gradient, metrics = loss_and_gradient(ObjectiveConfig(kernel=OBJECTIVES[name][0]), data)
    assert loss == 0 and (gradient == 0).all() and metrics.sums["tokens"] == 0
    assert_finite(loss, gradient, metrics)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"])
def test_a_response_without_tokens_counts_nothing(aggregation):
    data, config = batch(lengths=(4, 5, 3)), ObjectiveConfig(aggregation=aggregation)
    data.response_mask[4:9] = False
    loss, gradient, _ = loss_and_gradient(config, data)
    without, _, _ = loss_and_gradient(config, data.taken([0, 2]))
    torch.testing.assert_close(loss, without)
    assert (gradient[4:9] == 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_advantages_of_zero_move_nothing(name):
    data = batch()
    data.advantages[:] = 0.0
    loss, gradient, metrics = loss_and_gradient(ObjectiveConfig(kernel=OBJECTIVES[name][0]), data)
    assert loss == 0 and (gradient == 0).all()
    assert_finite(loss, gradient, metrics)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_garbage_outside_responses_is_never_seen(name):
    data, config = batch(2), ObjectiveConfig(kernel=OBJECTIVES[name][0])
    expected = loss_and_gradient(config, data)
    outside = ~data.response_mask
    data.log_probs[outside] = torch.nan
    data.old_log_probs[outside] = -torch.inf
    loss, gradient, metrics = loss_and_gradient(config, data)
    torch.testing.assert_close((loss, gradient), expected[:2], rtol=0, atol=0)
    assert metrics.sums == expected[2].sums


def test_bfloat16_is_computed_in_float32():
    data = batch(2, dtype=torch.bfloat16)
    loss, gradient, metrics = loss_and_gradient(ObjectiveConfig(), data)
    wide_loss, wide_gradient, wide = loss_and_gradient(ObjectiveConfig(), data.to(torch.float32))
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert loss == wide_loss
    torch.testing.assert_close(gradient, wide_gradient.to(torch.bfloat16), rtol=0, atol=0)
    torch.testing.assert_close(metrics.sequences["log_weight"], wide.sequences["log_weight"], rtol=0, atol=0)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf])
def test_an_impossible_behavior_log_prob_names_its_trajectory(value):
    data = batch(lengths=(3, 4, 5))
    data.response_mask[:] = True
    data.old_log_probs[5] = value
    with pytest.raises(
        NotFiniteError, match=r"trajectory 1 .*old_log_probs of its response token 2 is -?(inf|nan)"
    ) as caught:
        loss_and_gradient(ObjectiveConfig(), data)
    assert caught.value.sequence == 1


def test_advantages_of_another_length_are_refused():
    data = batch(lengths=(3, 4))
    with pytest.raises(ValueError, match="3 advantages for 2 sequences of 7 tokens"):
        loss_and_gradient(ObjectiveConfig(), replace(data, advantages=torch.ones(3)))
