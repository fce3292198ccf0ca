"""The independent computation: softmax attention written out in float64, one sequence and one head at a time."""

import math

import torch
from torch import Tensor


def dense_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None) -> Tensor:
    """[t, heads, d], [t, groups, d] twice -> [t, heads, d], all float64."""
    heads, groups = query.shape[1], key.shape[1]
    outputs = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        positions = torch.arange(len(q))
        future = positions[None, :] > positions[:, None]
        per_head = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = q[:, head] @ k[:, group].T * (scale or 1 / math.sqrt(q.shape[-1]))
            per_head.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, group])
        outputs.append(torch.stack(per_head, dim=1))
    return torch.cat(outputs)


def dense_with_gradients(qkv: list[Tensor], output_gradient: Tensor, lengths: list[int], scale: float | None):
    """(output, [gradients of q, k, v]), float64, from tensors of any dtype."""
    leaves = [x.detach().double().requires_grad_() for x in qkv]
    output = dense_attention(*leaves, lengths, scale)
    return output.detach(), list(torch.autograd.grad(output, leaves, output_gradient.double()))


def random_qkv(lengths: list[int], heads: int, groups: int, width: int, seed: int = 0) -> list[Tensor]:
    """Query, key, value and a gradient of the output. Scores spread enough that softmax is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), n, width) for n in (heads, groups, groups, heads)]
    return [torch.randn(shape, generator=generator) * 1.5 for shape in shapes]
