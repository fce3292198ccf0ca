"""RMS norm on a CPU, in half the time: torch's is put together from seven operators there, with as many gradients."""

from typing import Any

import torch
from torch import Tensor

from megatron_vespo.policy.norm import PackedRMSNorm


class RMSNormOnCPU(PackedRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps or torch.finfo(x.dtype).eps)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, in float32.

    Args:
        x: [..., h]; weight: [h].

    Returns:
        [..., h] of x's dtype, differentiable in `x` and `weight`.
    """
    return _RMSNorm.apply(x, weight, epsilon)  # type: ignore[return-value]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        square_sum = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square_sum.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        normalised = wide * scale
        ctx.save_for_backward(normalised, scale, weight)
        return (normalised * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x scale and g the gradient of the output: scale (g weight - n mean(g weight n)), and the sum of g n."""
        normalised, scale, weight = ctx.saved_tensors
        gradient = grad_outputs[0].float()
        product = gradient * normalised
        grad_weight = product.flatten(0, -2).sum(0)
        mean = (product @ weight.float()).div_(weight.shape[-1]).unsqueeze(-1)
        grad_x = torch.mul(gradient, weight, out=product).addcmul_(normalised, mean, value=-1).mul_(scale)
        return grad_x.to(grad_outputs[0].dtype), grad_weight.to(weight.dtype), None
