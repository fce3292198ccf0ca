"""VESPO's coefficients against TRL's published function."""

import pytest
import torch
from packed_batches import batch, loss_and_gradient, padded, trl_gamma_weights

from megatron_vespo.config import ObjectiveConfig


def trl_phi(data, importance_sampling_ratio=None):
    return trl_gamma_weights()(
        advantages=data.advantages[:, None],
        log_ratio_per_token=padded(data.log_probs - data.old_log_probs, data),
        mask=padded(data.response_mask.to(data.log_probs.dtype), data),
        importance_sampling_ratio=importance_sampling_ratio,
    ).flatten()


def trained(data):
    return torch.stack([data.response_mask[a:b].any() for a, b in data.bounds()])


@pytest.mark.parametrize("spread", [0.01, 0.3, 1.5])
def test_phi_is_trls_inside_its_clamp(spread):
    data = batch(spread=spread, lengths=tuple(range(1, 40)), dtype=torch.float32)
    _, _, metrics = loss_and_gradient(ObjectiveConfig(), data)
    some = trained(data)
    torch.testing.assert_close(metrics.sequences["phi"][some], trl_phi(data)[some], rtol=1e-5, atol=1e-7)


def test_phi_with_a_correction_of_tokens_is_trls():
    data = batch(dtype=torch.float32)
    weights = torch.rand(sum(data.lengths), generator=torch.Generator().manual_seed(3)) * 1.5 + 0.2
    weights = torch.where(data.response_mask, weights, 1.0)
    _, _, metrics = loss_and_gradient(ObjectiveConfig(), data, engine_log_weights=weights.log())
    expected = trl_phi(data, padded(weights, data, fill=1.0))
    some = trained(data)
    torch.testing.assert_close(metrics.sequences["phi"][some], expected[some], rtol=1e-5, atol=1e-7)


def test_a_masked_token_masks_its_response_as_in_trl():
    data = batch(lengths=(4, 4), dtype=torch.float32)
    data.response_mask[:] = True
    weights = torch.ones(8)
    weights[1] = 0.0
    _, gradient, metrics = loss_and_gradient(ObjectiveConfig(), data, engine_log_weights=weights.log())
    torch.testing.assert_close(metrics.sequences["phi"], trl_phi(data, padded(weights, data, fill=1.0)))
    assert (gradient[:4] == 0).all() and (gradient[4:] != 0).all()
