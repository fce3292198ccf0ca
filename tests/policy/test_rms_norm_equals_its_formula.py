"""RMS norm: values and gradients against the formula in float64."""

import pytest
import torch

from megatron_vespo.policy.rms_norm import rms_norm


@pytest.mark.parametrize("shape", [(50, 1, 64), (50, 1, 4, 16), (1, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_values_and_gradients(shape, dtype, tolerance):
    torch.manual_seed(0)
    epsilon = 1e-2
    x, gradient = (torch.randn(shape).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1]).to(dtype)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = exact[0] / (exact[0].square().mean(-1, keepdim=True) + epsilon).sqrt() * exact[1]
    expected_gradients = torch.autograd.grad(expected, exact, gradient.double())
    found = rms_norm(x, weight, epsilon)
    found_gradients = torch.autograd.grad(found, leaves, gradient)
    for one, other in zip((found, *found_gradients), (expected, *expected_gradients), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, atol=tolerance * other.abs().max().item(), rtol=0)


def test_a_row_that_is_not_dense_in_memory():
    wide, weight = torch.randn(10, 1, 3, 24), torch.ones(8)
    part = wide[..., 8:16]
    assert not part.is_contiguous()
    assert torch.equal(rms_norm(part, weight, 1e-5), rms_norm(part.contiguous(), weight, 1e-5))


def test_a_row_of_zeros_stays_zero():
    x = torch.zeros(2, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4), 1e-6)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 4))
    assert torch.allclose(x.grad, torch.full((2, 4), 1e3))
